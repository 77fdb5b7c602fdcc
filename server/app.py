"""The coordinator's side of a run, as Flower starts it: recipe in, rounds, results out.

Run config: `recipe` (JSON, a file, or a built-in recipe's name), `out` (folder of the results), `cache` (features),
`marks` (file that remembers the holders' ledgers between runs; none when it is left out).
"""

from __future__ import annotations

import errno
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedhead import __version__
from fedhead.common import progress, protocol
from fedhead.common.errors import FedheadError, RunError
from fedhead.common.models.saved import save_model
from fedhead.common.results import Result
from fedhead.server.central import central_of
from fedhead.server.checkpoints import Checkpoint, memory_of, remember
from fedhead.server.cohorts import Cohorts
from fedhead.server.desk import Desk, offered, prepare
from fedhead.server.evaluation import Evaluator, left_out
from fedhead.server.marks import newest, read_marks, write_marks
from fedhead.server.metrics import estimate
from fedhead.server.requests import Plan, make_plan
from fedhead.server.roster import Everybody, Roster
from fedhead.server.rounds import RoundRecord, Rounds, around
from fedhead.server.spending import account
from fedhead.server.strategies import strategy_class

app = ServerApp()
log = logging.getLogger("fedhead.server")

HELLO_SECONDS = 600.0
FULL: Final = (errno.ENOSPC, errno.EDQUOT)
FULL_TRIES, FULL_PAUSE = 60, 1.0  # seconds between them: a deployed run waits a minute for room on a full disk


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; leaves `result.json` and `model/` in the folder `out`."""
    key = str(context.run_config["recipe"])
    out = Path(str(context.run_config.get("out", "")) or "runs/latest")
    desk = offered(key) or prepare(key, str(context.run_config.get("cache", "")))
    resumed = Checkpoint.read(out, key) if context.run_config.get("resume") else None
    marks = str(context.run_config.get("marks", ""))
    outcome = Coordinator(desk, grid, key, out, resumed, Path(marks) if marks else None).run()
    # A folder with a result.json is taken for a whole run, which can't be resumed: it comes last.
    save_model(out / "model", desk.trainable, desk.config, desk.backbone, desk.task)
    outcome.result.write(out)


@dataclass(frozen=True)
class Outcome:
    """The result, and the final head as name -> tensor."""

    result: Result
    head: dict[str, Tensor]


@dataclass(frozen=True)
class Deployed:
    """How the rounds of a deployment are held.

    Attributes
    ----------
    names : sequence of str
        All registered holders: what cohorts are made of, whoever is connected.
    roster : Roster
    least : int
        Fewest updates that make a new head.
    deadline : float
        Seconds that a round may take.
    told : callable
        Called after every round with the rounds so far, and the last metrics.
    declared : mapping
        Holder -> the public constant that it divides by, where that is not the recipe's.
    """

    names: Sequence[str]
    roster: Roster
    least: int
    deadline: float
    told: Callable[[Rounds, Mapping[str, float]], None]
    declared: Mapping[str, int] = field(default_factory=dict)


class Coordinator:
    """One run over a grid.

    Parameters
    ----------
    desk : Desk
    grid : Grid
    key : str
        The recipe as `to_json` writes it.
    out : Path
        Folder of the results; checkpoints go below it.
    resumed : Checkpoint, optional
        Where to go on.
    marks : Path, optional
        File that remembers the holders' ledgers between runs.
    deployed : Deployed, optional
        Holders that come and go, and a checkpoint after every round. Left out, all holders are there from the first
        message to the last, and checkpoints are written with the evaluations.
    """

    def __init__(
        self,
        desk: Desk,
        grid: Grid,
        key: str,
        out: Path,
        resumed: Checkpoint | None = None,
        marks: Path | None = None,
        deployed: Deployed | None = None,
    ) -> None:
        self.desk, self.grid, self.config = desk, grid, desk.config
        self.key, self.out, self.resumed, self.marks, self.deployed = key, out, resumed, marks, deployed
        self.metrics: dict[int, dict[str, float]] = {} if resumed is None else dict(resumed.metrics)
        self.evaluation_seconds = 0.0
        self.evaluator = Evaluator(desk.trainable, desk.task, desk.test)

    def run(self) -> Outcome:
        """All rounds, then the result."""
        started = time.perf_counter()
        config, deployed = self.config, self.deployed
        if deployed is None:
            nodes = self._greet()
            names, roster = sorted(nodes), cast(Roster, Everybody(nodes))
        else:
            names, roster = sorted(deployed.names), deployed.roster
        cohorts = Cohorts(names, config.holders.per_round or len(names), config.run.seed)
        plan = make_plan(
            config,
            uuid.uuid4().hex if self.resumed is None else self.resumed.run,
            self.desk.backbone.digest,
            self.desk.declared[0],
            cohorts.participations(config.training.rounds),
        )
        like = {name: value.detach().clone() for name, value in self.desk.trainable.trained().items()}
        rounds = Rounds(cohorts, roster, plan.request, like, uniform=config.strategy.weights == "uniform")
        rounds.run = plan.run
        if deployed is not None:
            rounds.least, rounds.deadline, rounds.declared = deployed.least, deployed.deadline, deployed.declared
        strategy = self._strategy(rounds)
        rounds.central = central_of(config, plan.noise_multiplier, cohorts.holders, self.out, self.desk.simulated)
        try:
            head = self._rounds(rounds, plan, strategy, like)
        except BaseException:
            try:
                self._keep_marks(rounds)
            except (OSError, FedheadError) as fault:  # how the run ended counts: whether it was stopped, or goes on
                log.warning("%s can't be written: %s", self.marks, fault)
            raise
        else:
            self._patiently(self.marks, lambda: self._keep_marks(rounds))
        finally:
            if rounds.central is not None:
                rounds.central.close()
        final = self.evaluator(head)
        return Outcome(self._result(rounds, plan, final, time.perf_counter() - started), head)

    def _strategy(self, rounds: Rounds) -> FedAvg:
        """The recipe's strategy, with what it and the rounds remember of an earlier start."""
        if self.marks is not None:
            rounds.marks.update(read_marks(self.marks))
        strategy = around(*strategy_class(self.config.strategy), rounds)
        if self.resumed is not None:
            rounds.history.extend(self.resumed.history)
            rounds.done = self.resumed.round
            if self.deployed is not None:
                rounds.again = rounds.done + 1
            rounds.marks = newest(rounds.marks, self.resumed.marks)
            remember(strategy, self.resumed.memory)
        return strategy

    def _rounds(self, rounds: Rounds, plan: Plan, strategy: FedAvg, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hold the rounds that are left; gives the last head."""
        config = self.config
        first = dict(like) if self.resumed is None else {name: self.resumed.head[name] for name in like}
        last = first

        def after_round(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            nonlocal last
            done = rounds.done + number
            last = protocol.from_arrays(arrays, like)
            self._evaluate(done, arrays)
            evaluated = number > 0 and done in self.metrics and done < config.training.rounds
            if evaluated or self.deployed is not None:
                self._checkpoint(rounds, strategy, plan, last, done)
            if self.deployed is not None:
                self.deployed.told(rounds, self.metrics.get(max(self.metrics, default=0), {}))
            return None

        found = strategy.start(
            grid=self.grid,
            initial_arrays=protocol.to_arrays(first),
            num_rounds=config.training.rounds - rounds.done,
            evaluate_fn=after_round,
            timeout=math.inf if rounds.deadline is None else rounds.deadline,
        )
        return protocol.from_arrays(found.arrays, like) if found.arrays else last

    def _greet(self) -> dict[str, int]:
        """Ask every node which holder it is: name -> node id."""
        expected, until = self.config.holders.count, time.monotonic() + HELLO_SECONDS
        while len(ids := list(self.grid.get_node_ids())) < expected:
            if time.monotonic() > until:
                raise RunError(f"{len(ids)} of {expected} holders came within {HELLO_SECONDS:.0f} s. Start the others.")
            time.sleep(0.2)
        messages = [Message(RecordDict(), node, MessageType.QUERY) for node in ids]
        replies = list(self.grid.send_and_receive(messages, timeout=HELLO_SECONDS))
        nodes = {
            protocol.read_release(reply)[0]: reply.metadata.src_node_id for reply in replies if not reply.has_error()
        }
        if len(nodes) < len(ids):
            raise RunError(
                f"{len(nodes)} of {len(ids)} holders answered the first message. Their own logs say what is missing."
            )
        return nodes

    def _checkpoint(self, rounds: Rounds, strategy: FedAvg, plan: Plan, head: dict[str, Tensor], done: int) -> None:
        memory = memory_of(strategy)
        found = Checkpoint(self.key, plan.run, done, head, memory, rounds.history, self.metrics, rounds.marks)
        self._patiently(self.out, lambda: found.write(self.out))
        if self.deployed is not None:
            self._patiently(self.marks, lambda: self._keep_marks(rounds))

    def _keep_marks(self, rounds: Rounds) -> None:
        """Remember all ledgers that were seen, those of holders that no round was asked of, too."""
        rounds.marks = newest(rounds.marks, rounds.roster.marks())
        if self.marks is not None:
            write_marks(self.marks, rounds.marks)

    def _patiently(self, path: Path | None, write: Callable[[], None]) -> None:
        """Write to a path; a deployed run waits a while for room on a disk that is full, a simulation doesn't."""
        for tried in range(FULL_TRIES if self.deployed is not None else 0):
            try:
                write()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if tried == 0:
                    log.warning(
                        "%s can't be written (%s): tried again for %.0f s. Free some space.",
                        path, error.strerror, FULL_TRIES * FULL_PAUSE,
                    )  # fmt: skip
            else:
                return
            time.sleep(FULL_PAUSE)
        write()

    def _evaluate(self, number: int, arrays: ArrayRecord) -> None:
        rounds = self.config.training.rounds
        note = ""
        if number == rounds or number % self.config.run.evaluate_every == 0:
            started = time.perf_counter()
            state = protocol.from_arrays(arrays, self.desk.trainable.trained())
            self.metrics[number] = self.evaluator(state)
            self.evaluation_seconds += time.perf_counter() - started
        if self.metrics and self.metrics[max(self.metrics)]:
            name, value = next(iter(self.metrics[max(self.metrics)].items()))
            note = f"{name} {value:.3f}"
        progress.advance("rounds", number, rounds, note)

    def _noised(self, record: RoundRecord) -> dict[str, Any]:
        """The estimate from a round's noised counts, where there are any."""
        metrics = self.config.privacy.metrics
        if metrics is None or not record.counts:
            return {}
        counts = [record.counts[name] for name in sorted(record.counts)]
        own = {} if self.deployed is None else self.deployed.declared
        declared = [own.get(name, self.desk.declared[0]) for name in sorted(record.counts)]
        found = estimate(counts, declared, metrics.fraction, metrics.noise_multiplier)
        return {} if found is None else {"noised": found.to_row()}

    def _result(self, rounds: Rounds, plan: Plan, final: dict[str, float], seconds: float) -> Result:
        holder_seconds = sum(record.seconds for record in rounds.history)
        # Rounds of an earlier start are in the history, but not in the seconds of this one.
        seconds += sum(record.seconds for record in rounds.history if record.round <= rounds.done)
        epsilons, privacy = account(rounds.history, self.config, set(self.metrics))
        return Result(
            fedhead=__version__,
            name="",
            config=self.config.model_dump(mode="json"),
            rounds=[
                {
                    "round": record.round,
                    "metrics": self.metrics.get(record.round),
                    "seconds": record.seconds,
                    "bytes_up": record.bytes_up,
                    "bytes_down": record.bytes_down,
                    "holders": record.holders,
                    "refused": record.refused,
                    "epsilon": spent,
                    **self._noised(record),
                }
                for record, spent in zip(rounds.history, epsilons, strict=True)
            ],
            final=final,
            majority=self.evaluator.majority(),
            baseline=None,
            privacy=privacy,
            holders=[],
            model={
                "backbone": self.config.model.backbone,
                "digest": self.desk.backbone.digest,
                "trained_parameters": sum(value.numel() for value in rounds.like.values()),
                "task": self.config.task.kind,
            },
            declared_records={"value": self.desk.declared[0], "origin": self.desk.declared[1]},
            timing={
                **self.desk.timing,
                "training_seconds": holder_seconds,
                "server_seconds": seconds - holder_seconds,
            },
            notes=[*left_out(self.desk.test), *(rounds.notes[name] for name in sorted(rounds.notes))],
        )
