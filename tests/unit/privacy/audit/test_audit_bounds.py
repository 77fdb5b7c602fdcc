"""Lower bounds and tests of a claim: against linear programs over all mechanisms, closed forms, and odd input.

The programs are the second implementation. By symmetry the worst mechanism that is guessed in full is given by q_k, the
probability of each pattern of guesses with k right; all its privacy constraints are linear.
"""

import json
import math
import time
from math import comb

import numpy as np
import pytest
from scipy.optimize import brentq, linprog
from scipy.stats import binom, norm

from fedhead.common.errors import InputError
from fedhead.common.privacy.audit.bounds import (
    Attack,
    clopper_pearson,
    f_dp,
    f_dp_p_value,
    guess_count,
    one_run,
    one_run_p_value,
)
from fedhead.common.privacy.audit.curves import Curve, approximate_curve, claimed_curve, gaussian_curve
from fedhead.common.privacy.gaussian import gdp_delta, gdp_epsilon, mu_for

DELTA = 1e-5
MU = mu_for(5.0, DELTA)
CLAIM = gaussian_curve(MU)


def draw(canaries, mu, seed=0):
    rng = np.random.default_rng(seed)
    included = rng.random(canaries) < 0.5
    return included * mu + rng.normal(size=canaries), included


def all_three(scores, included, claim=CLAIM, claimed=(5.0, DELTA), gaussian=True):
    attack = Attack(scores, included, DELTA)
    return [
        one_run(attack, claimed=claimed),
        f_dp(attack, claim=claim, gaussian=gaussian),
        clopper_pearson(attack, claim=claim, gaussian=gaussian),
    ]


def curve_of(pairs):
    """The claim to keep every (epsilon, delta) of the pairs."""
    return Curve(lambda power: np.max([approximate_curve(*pair).cost(power) for pair in pairs], axis=0))


def worst_mechanism(canaries, right, pairs):
    """Largest P[at least `right` of all canaries are guessed], over every mechanism that keeps all (epsilon, delta)."""
    m, weights = canaries, np.array([comb(canaries - 1, k) for k in range(canaries)], dtype=float)
    size = (m + 1) + len(pairs) * 2 * m  # q, then for each pair how far each two neighbours exceed e^epsilon
    upper, least = [], []
    for number, (epsilon, delta) in enumerate(pairs):
        start, total = m + 1 + number * 2 * m, np.zeros(size)
        for k in range(m):
            for slot, more, less in ((start + k, k + 1, k), (start + m + k, k, k + 1)):
                row = np.zeros(size)
                row[[more, less, slot]] = 1.0, -math.exp(epsilon), -1.0
                upper.append(row)
                least.append(0.0)
                total[slot] = weights[k]
        upper.append(total)
        least.append(delta)
    patterns = np.array([comb(m, k) for k in range(m + 1)] + [0] * (size - m - 1), dtype=float)
    aim = np.where(np.arange(size) >= right, -patterns, 0.0)
    found = linprog(aim, np.array(upper), least, patterns[None], [1.0], bounds=(0, None), method="highs")
    assert found.status == 0
    return -found.fun


@pytest.mark.parametrize("canaries", [3, 6, 10, 16])
@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.05])
def test_one_run_never_falls_below_the_worst_mechanism(canaries, epsilon, delta):
    for right in range(canaries + 1):
        worst = worst_mechanism(canaries, right, [(epsilon, delta)])
        found = one_run_p_value(canaries, canaries, right, epsilon, delta)
        assert found >= worst - 1e-6, (right, found, worst)
        if delta == 0:
            assert found == pytest.approx(worst, abs=1e-6)  # and it can't be improved
    if delta == 0.05:  # a test that forgets about delta would not do
        assert one_run_p_value(canaries, canaries, canaries, epsilon, 0.0) < worst - 1e-3


def test_one_run_is_the_published_formula():
    for m, r, v, e, d in [(50, 20, 15, 0.7, 1e-3), (1000, 100, 90, 2.0, 1e-5), (30, 30, 25, 1.0, 1e-2)]:
        p = math.exp(e) / (1 + math.exp(e))
        mass = [binom.pmf(k, r, p) for k in range(r + 1)]
        tail = sum(mass[v:])  # small enough to be given as it is
        steepest = max(sum(mass[max(0, v - i) : v]) / i for i in range(1, m + 1))
        assert one_run_p_value(m, r, v, e, d) == pytest.approx(tail + 2 * m * d * steepest, rel=1e-9)


def test_the_published_formula_is_not_taken_at_its_word_where_it_fails():
    delta = 0.05
    worst, formula = worst_mechanism(3, 1, [(0.0, delta)]), (7 + 6 * delta) / 8
    assert worst == pytest.approx((7 + 7 * delta) / 8, abs=1e-9)
    assert worst > formula + 1e-3
    assert one_run_p_value(3, 3, 1, 0.0, delta) == 1.0


@pytest.mark.parametrize("canaries", [4, 8])
def test_f_dp_never_falls_below_the_worst_mechanism(canaries):
    for mu in (0.3, 1.0, 2.0):
        pairs, half = ([(e, gdp_delta(size, e)) for e in np.linspace(0, 8, 33)] for size in (mu, mu / 2))
        for right in range(canaries + 1):
            worst = worst_mechanism(canaries, right, pairs)
            assert f_dp_p_value(canaries, canaries, right, curve_of(pairs)) >= worst - 1e-6
        # a claim of less would be refuted by this mechanism: the comparison sees it
        assert f_dp_p_value(canaries, canaries, canaries, curve_of(half)) < worst - 1e-4


def refuted_by_program(canaries, guesses, right, pairs):
    """P[at least `right`] as a linear program over the law of the number of right guesses.

    Its constraints for one canary's coin, averaged over canaries: mean of "right, and i or more right in all" against
    mean of "wrong, and i - 1 or more right in all", for every i up to `right` and every line of the curve.
    """
    number, upper, least = np.arange(guesses + 1), [], []
    for i in range(1, right + 1):
        rights = np.where(number >= i, number, 0) / canaries
        wrongs = np.where(number >= i - 1, guesses - number, 0) / canaries
        for epsilon, delta in pairs:
            # right <= e^epsilon wrong + delta, and that line turned over, 1 - wrong <= e^epsilon (1 - right) + delta
            upper += [rights - math.exp(epsilon) * wrongs, math.exp(epsilon) * rights - wrongs]
            least += [delta, math.exp(epsilon) + delta - 1]
    aim = np.where(number >= right, -1.0, 0.0)
    found = linprog(aim, np.array(upper), least, np.ones((1, guesses + 1)), [1.0], bounds=(0, None), method="highs")
    assert found.status == 0
    return -found.fun


@pytest.mark.parametrize(("canaries", "guesses"), [(20, 20), (40, 16), (100, 30), (7, 1)])
@pytest.mark.parametrize("pairs", [[(1.0, 1e-3)], [(0.0, 0.4), (0.5, 0.2), (1.5, 0.02), (4.0, 1e-6)]])
def test_f_dp_is_the_optimum_of_its_linear_program(canaries, guesses, pairs):
    for right in {1, (guesses + 1) // 2, (3 * guesses + 3) // 4, guesses}:
        expected = refuted_by_program(canaries, guesses, right, pairs)
        assert f_dp_p_value(canaries, guesses, right, curve_of(pairs)) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_p_values_fall_with_right_guesses_and_rise_with_the_claim():
    counts = [0, 20, 40, 50, 55, 60]
    for table in (
        [[one_run_p_value(200, 60, v, e, DELTA) for e in (0.0, 1.0, 4.0, math.inf)] for v in counts],
        [[f_dp_p_value(200, 60, v, gaussian_curve(mu)) for mu in (0.0, 0.3, 1.0, math.inf)] for v in counts],
    ):
        assert (np.diff(table, axis=0) <= 1e-12).all()
        assert (np.diff(table, axis=1) >= -1e-12).all()
        assert all(row[-1] == 1 for row in table)


def perfect(canaries):
    included = np.arange(canaries) % 2 == 0
    return np.where(included, 1.0, -1.0) * (1 + np.arange(canaries)), included


def test_one_run_bound_of_a_perfect_attack_in_closed_form():
    scores, included = perfect(400)
    found = one_run(Attack(scores, included, 1e-300), claimed=(1.0, 0.0))
    assert (found.guesses, found.right) == (2 * guess_count(400), 2 * guess_count(400))
    least = 0.05 ** (1 / found.guesses)
    assert found.epsilon == pytest.approx(math.log(least / (1 - least)), rel=1e-5)
    assert found.claim_p_value == pytest.approx((math.e / (1 + math.e)) ** found.guesses, rel=1e-9)


def test_clopper_pearson_bound_of_a_perfect_attack_in_closed_form():
    included = np.arange(60) % 2 == 0
    found = clopper_pearson(Attack(np.where(included, 1.0, -1.0), included, DELTA), claim=CLAIM, gaussian=True)
    assert found.right == found.guesses == 42

    # which canaries are counted is drawn with a fixed seed; how many of them were in is tried out
    def separation(ins, level):
        return norm.ppf((level / 2) ** (1 / ins)) - norm.isf((level / 2) ** (1 / (42 - ins)))

    split = [
        ins
        for ins in range(12, 31)
        if found.epsilon == pytest.approx(gdp_epsilon(separation(ins, 0.05), DELTA), rel=1e-5)
    ]
    assert split
    p_values = [math.exp(brentq(lambda log, ins=ins: separation(ins, math.exp(log)) - MU, -25, -0.01)) for ins in split]
    assert any(found.claim_p_value == pytest.approx(p, rel=1e-4) for p in p_values)


def test_bounds_tell_a_weak_mechanism_from_a_strong_one():
    for weak, strong in zip(all_three(*draw(2000, 2 * MU)), all_three(*draw(2000, MU)), strict=True):
        assert weak.epsilon > strong.epsilon + 1
        assert weak.claim_p_value < strong.claim_p_value
        assert 0 < strong.epsilon < 5


def test_epsilon_delta_bounds_need_no_gaussian_curve_and_are_weaker():
    scores, included = draw(2000, MU)
    free, tight = all_three(scores, included, gaussian=False), all_three(scores, included)
    for a, b in zip(free[1:], tight[1:], strict=True):
        assert 0 < a.epsilon < b.epsilon
        assert "Gaussian" in b.note
        assert "Gaussian" not in a.note
        assert a.claim_p_value == b.claim_p_value
    assert "independent" in free[2].note
    assert tight[0].note == free[1].note == ""


def test_only_the_order_of_scores_counts():
    scores, included = draw(300, MU)
    assert all_three(scores, included) == all_three(np.exp(scores / 3) * 1e9, included)


def test_ties_fall_without_a_look_at_the_coins():
    included = draw(300, 0.0)[1]
    one, other = (
        f_dp(Attack(np.ones(300), coins, DELTA), claim=CLAIM, gaussian=True) for coins in (included, ~included)
    )
    assert one.right + other.right == one.guesses
    looking = Attack(included.astype(float), included, DELTA)  # a tie-break that does look
    sorted_out = f_dp(looking, claim=CLAIM, gaussian=True)
    assert sorted_out.right == sorted_out.guesses


@pytest.mark.parametrize("canaries", [1, 2, 3, 7, 20, 10_000])
@pytest.mark.parametrize("gaussian", [True, False])
def test_odd_observations_give_finite_honest_answers(canaries, gaussian):
    noise, coins = draw(canaries, 0.0)
    every, none = np.ones(canaries, dtype=bool), np.zeros(canaries, dtype=bool)
    no_noise = np.where(coins, math.inf, -math.inf)
    for scores, included in [
        (noise, every),
        (noise, none),
        (np.zeros(canaries), coins),
        (no_noise, coins),
        (np.full(canaries, math.inf), coins),
        (-no_noise, coins),
    ]:
        for found in all_three(scores, included, gaussian=gaussian):
            assert 0 <= found.epsilon < 200
            assert 0 < found.claim_p_value <= 1
            assert 0 <= found.right <= found.guesses <= canaries
            json.dumps(found.to_dict(), allow_nan=False)
            if scores is not no_noise:
                assert found.epsilon < 1


@pytest.mark.parametrize("canaries", [1, 2, 5, 20, 100, 2000, 10_000])
def test_guesses_never_overlap(canaries):
    assert 0 <= 2 * guess_count(canaries) <= canaries
    assert guess_count(canaries) > 0 or canaries == 1


def test_no_noise_refutes_every_claim_from_twenty_canaries_on_and_an_empty_claim_never():
    attack = Attack(*perfect(20), DELTA)
    assert f_dp(attack, claim=gaussian_curve(mu_for(1.0, DELTA)), gaussian=True).claim_p_value < 0.01
    nothing = all_three(*perfect(2000), claim=gaussian_curve(math.inf), claimed=(math.inf, DELTA))
    assert [found.claim_p_value for found in nothing] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("rows", [[(1.0, 1.0, 3)], [(1.0, 0.02, 300)]])
def test_two_thousand_canaries_take_less_than_a_second(rows):
    claim, observed = claimed_curve(rows), draw(2000, 2 * MU)
    for test in (one_run, f_dp, clopper_pearson):
        options = {"claimed": (5.0, DELTA)} if test is one_run else {"claim": claim, "gaussian": False}
        start = time.process_time()
        test(Attack(*observed, DELTA), **options)
        assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scores": np.array([])}, "scores is of shape"),
        ({"scores": np.zeros(0), "included": np.zeros(0, dtype=bool)}, "at least one canary"),
        ({"scores": np.zeros((10, 1))}, "scores is of shape"),
        ({"scores": np.zeros(9)}, "scores is of shape"),
        ({"scores": np.full(10, math.nan)}, "scores is NaN for 10 canaries"),
        ({"included": np.zeros(10)}, "included is of float64"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": math.nan}, "confidence is nan"),
    ],
)
def test_bad_input_is_named_in_one_line(change, says):
    given = {"scores": np.zeros(10), "included": np.zeros(10, dtype=bool), "delta": DELTA, "confidence": 0.95} | change
    with pytest.raises(InputError, match=says) as fault:
        Attack(**given)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("claimed", [(-1.0, DELTA), (math.nan, DELTA), (1.0, 1.0), (1.0, -0.1)])
def test_a_claim_that_is_none_is_named(claimed):
    with pytest.raises(InputError, match="claimed is"):
        one_run(Attack(*draw(10, 1.0), DELTA), claimed=claimed)
