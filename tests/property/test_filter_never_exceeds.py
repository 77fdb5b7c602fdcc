"""Whatever an adversary gets past the filter, an independent accountant finds at most the budget.

Hypothesis plays the adversary: it chooses the terms, offers full-batch steps, counts and Poisson plans to several runs,
fills up what is left with ever smaller releases, and starts plans only to stop them. The accountant knows nothing of
the filter: the closed formula for Gaussians, dp-accounting's privacy loss distributions (rounded upwards) where a plan
is among them. Filters with one fault each go through the same test and must fail it.
"""

import math
from dataclasses import replace
from functools import cache

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedhead.common.privacy.events import CountEvent, GaussianEvent, PoissonEvent
from fedhead.common.privacy.filters import Charge, Totals, admits, charge_of, spent
from fedhead.common.privacy.terms import Terms

DELTA = 1e-3
RUNS = (0, 1, 2)
# reveals a record with nearly the probability delta, and else next to nothing: all delta, hardly any epsilon
REVEALING = PoissonEvent(0.2, 1.0, 0.9 * DELTA, 1)
PLANS = (  # and the part of the plans' delta at which they are offered
    (PoissonEvent(2.0, 1.0, 0.05, 40), 0.999),
    (PoissonEvent(2.0, 1.0, 0.05, 40), 0.4995),
    (PoissonEvent(1.0, 1.0, 0.02, 20), 0.4995),
    (REVEALING, 0.999),
)


# The adversary: a list of moves, each made after the answers to all earlier ones.


def moves():
    run = st.sampled_from(RUNS)
    noise = st.floats(0.2, 100.0)
    steps = st.integers(1, 50)
    return st.one_of(
        st.tuples(st.just("offer"), run, st.builds(GaussianEvent, noise, st.just(1.0), steps)),
        st.tuples(st.just("offer"), run, st.builds(CountEvent, noise, st.just(1.0), steps)),
        st.tuples(st.just("plan"), run, st.sampled_from(PLANS)),
        st.tuples(st.just("hammer"), run, st.sampled_from(PLANS)),
        st.tuples(st.just("fill"), run, st.sampled_from([0.1, 1.0, 8.0])),
    )


TERMS = st.builds(
    Terms,
    epsilon=st.sampled_from([0.5, 2.0, 8.0]),
    delta=st.just(DELTA),
    poisson_share=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
)


@st.composite
def games(draw):
    terms = draw(TERMS)
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.25, 1.0]))
        terms = Terms(terms.epsilon, DELTA, terms.poisson_share, terms.epsilon * share)
    return terms, draw(st.lists(moves(), min_size=1, max_size=10))


# The filter, and its faulty twins.


class Filter:
    """Keeps the totals of a domain and of its runs, and asks `admits` before each release."""

    def __init__(self, terms):
        self.terms = terms
        self.domain = Totals()
        self.runs = dict.fromkeys(RUNS, Totals())

    def plan_delta(self, part):
        return (self.terms.poisson_share or 1.0) * DELTA * part

    def offer(self, run, charge):
        domain_after, run_after = self.domain.plus(charge), self.runs[run].plus(charge)
        if not self.decide(domain_after, run_after, charge):
            return False
        self.domain, self.runs[run] = domain_after, run_after
        return True

    def decide(self, domain_after, run_after, charge):
        return admits(self.terms, domain_after, run_after) is None

    def stopped(self, run, charge):
        """A plan was stopped half-way: nothing comes back."""


class Refunds(Filter):
    def stopped(self, run, charge):
        back = Charge(0.0, -charge.epsilon, -charge.delta)
        self.domain, self.runs[run] = self.domain.plus(back), self.runs[run].plus(back)


class OnlyTheRun(Filter):
    def decide(self, domain_after, run_after, charge):
        return admits(self.terms, run_after, run_after) is None


class EachAlone(Filter):
    def decide(self, domain_after, run_after, charge):
        alone = Totals().plus(charge)
        return admits(self.terms, alone, alone) is None


class NoRunLimit(Filter):
    def decide(self, domain_after, run_after, charge):
        return admits(self.terms, domain_after, Totals()) is None


class WholeDeltaTwice(Filter):
    """Both parts take the whole delta, as if the other did not exist."""

    def plan_delta(self, part):
        return DELTA * part

    def decide(self, domain_after, run_after, charge):
        return all(
            terms is None
            or (
                totals.mu_squared <= Terms(terms.epsilon * (1 - terms.poisson_share), terms.delta).mu_squared
                and totals.epsilon <= terms.epsilon * terms.poisson_share
                and totals.delta <= terms.delta
            )
            for terms, totals in ((self.terms, domain_after), (self.terms.run, run_after))
        )

    def __init__(self, terms):
        # a share of 1 leaves no epsilon to the mu part
        super().__init__(terms if terms.poisson_share < 1 else Terms(terms.epsilon, terms.delta, 0.4))


# The independent accountant.


def gaussian_delta(mu, epsilon):
    """Balle, Wang (2018), Theorem 8, from logarithms of the normal distribution."""
    if mu == 0:
        return 0.0
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))


@cache
def plan_losses(plan, steps):
    one = pld.from_gaussian_mechanism(
        plan.noise_multiplier, value_discretization_interval=1e-3, sampling_prob=plan.sample_rate
    )
    return one.self_compose(steps)


@cache
def plans_losses(plans):
    *before, last = plans
    return plans_losses(tuple(before)).compose(plan_losses(*last)) if before else plan_losses(*last)


def delta_of(released, epsilon):
    """The delta that goes with epsilon for all releases: (event, steps that were taken)."""
    square = math.fsum(
        steps / event.noise_multiplier**2 for event, steps in released if not isinstance(event, PoissonEvent)
    )
    plans = tuple(sorted(((e, n) for e, n in released if isinstance(e, PoissonEvent)), key=repr))
    if not plans:
        return gaussian_delta(math.sqrt(square), epsilon)
    losses = plans_losses(plans)
    if square:
        gaussian = pld.from_gaussian_mechanism(1 / math.sqrt(square), value_discretization_interval=1e-3)
        losses = losses.compose(gaussian)
    return losses.get_delta_for_epsilon(epsilon)


# The game.


def play(make, terms, moves):
    """Everything that was released, as run -> list of [event, steps taken, charge]."""
    judge = make(terms)
    released = {run: [] for run in RUNS}

    def offer(run, event, plan_delta=None):
        charge = charge_of(event, plan_delta)
        admitted = judge.offer(run, charge)
        if admitted:
            released[run].append([event, event.steps, charge])
        return admitted

    for kind, run, what in moves:
        if kind == "offer":
            offer(run, what)
        elif kind == "plan":
            offer(run, what[0], judge.plan_delta(what[1]))
        elif kind == "hammer":  # the same plan again and again, each stopped before its last step
            for _ in range(16):
                if not offer(run, what[0], judge.plan_delta(what[1])):
                    break
                last = released[run][-1]
                last[1] = max(1, last[1] - 1)
                judge.stopped(run, last[2])
        else:  # ever smaller releases, until nothing fits any more
            noise = what / math.sqrt(Terms(terms.epsilon, DELTA).mu_squared)
            for _ in range(24):
                offer(run, GaussianEvent(noise, 1.0, 1))
                noise *= math.sqrt(2)
    return judge.terms, released


def check(make, game):
    terms, released = play(make, *game)
    everything = [(event, steps) for rows in released.values() for event, steps, _ in rows]
    assert delta_of(everything, terms.epsilon) <= terms.delta * (1 + 1e-9)
    if terms.run is not None:
        for rows in released.values():
            alone = [(event, steps) for event, steps, _ in rows]
            assert delta_of(alone, terms.run.epsilon) <= terms.run.delta * (1 + 1e-9)


def search(make, examples):
    @given(games())
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # a fault is looked for, not its smallest example
        suppress_health_check=list(HealthCheck),
    )
    def run(game):
        check(make, game)

    run()


def test_no_adversary_exceeds_the_budget():
    search(Filter, 200)


@pytest.mark.parametrize("make", [Refunds, OnlyTheRun, EachAlone, NoRunLimit, WholeDeltaTwice])
def test_a_faulty_filter_is_found_out(make):
    with pytest.raises(AssertionError):
        search(make, 300)


def state(figure, examples):
    """What was spent before the terms were declared, or under others, is stated by them all the same."""

    @given(
        TERMS | st.builds(Terms, st.just(1.0), st.sampled_from([1e-5, 0.3, 0.95]), st.sampled_from([0.0, 0.5, 1.0])),
        st.lists(st.tuples(st.sampled_from(PLANS), st.sampled_from([1e-6, 0.5, 1.0, 1.5, 300.0])), max_size=3),
        st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    )
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def run(terms, plans, mu):
        events = [(plan, plan.steps) for (plan, _), _ in plans]
        totals = Totals()
        for (plan, part), times in plans:
            totals = totals.plus(charge_of(plan, part * times * DELTA))
        if mu:
            events.append((GaussianEvent(1 / mu, 1.0, 1), 1))
            totals = totals.plus(charge_of(events[-1][0]))
        found = figure(terms, totals)
        if events and found.epsilon < math.inf:
            assert delta_of(events, found.epsilon) <= found.delta * (1 + 1e-9)
            assert found.delta >= totals.delta

    run()


def test_no_figure_is_below_an_exact_composition_at_its_delta():
    state(spent, 200)


def test_a_figure_that_forgets_the_plans_delta_is_found_out():
    with pytest.raises(AssertionError):
        state(lambda terms, totals: replace(spent(terms, totals), delta=terms.delta), 200)


def test_the_filter_uses_up_what_it_may():
    """A filter that refuses everything would pass the test above."""
    terms = Terms(2.0, DELTA, 0.4)
    plan = PLANS[0]
    _, released = play(Filter, terms, [("plan", 1, plan), ("fill", 0, 1.0)])
    assert [row[0] for row in released[1]] == [plan[0]]
    square = math.fsum(1 / event.noise_multiplier**2 for event, *_ in released[0])
    assert square == pytest.approx(terms.mu_squared, rel=1e-4)
    only = [(event, steps) for event, steps, _ in released[0]]
    assert delta_of(only, 1.2) == pytest.approx(0.6 * DELTA, rel=1e-2)
