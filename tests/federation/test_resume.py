"""A run that was stopped goes on from its last checkpoint and ends with the head of an unbroken run."""

import errno
import time

import pytest

from fedhead.common.errors import InputError, RunError
from fedhead.common.privacy.ledger import Ledger
from fedhead.server import checkpoints
from fedhead.server.checkpoints import Checkpoint
from fedhead.simulations.simulate import simulate, simulate_seeds


class Stop(Exception):
    pass


def stop_at(number):
    def listen(stage, done, total, note):
        if stage == "rounds" and done == number:
            raise Stop

    return listen


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "fedadagrad", "fedyogi", "fedavg"])
@pytest.mark.parametrize("number", [3, 7])
def test_resumed_run_ends_with_the_same_bits(tiny, tmp_path, kind, number):
    config = tiny(
        {
            "run.exact": True, "run.evaluate_every": 2, "strategy": {"kind": kind},
            "training.schedule": {"kind": "cosine"}, "holders.per_round": 3,
        }
    )  # fmt: skip
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(Stop):
        simulate(config, tmp_path / "broken", progress_listener=stop_at(number))
    assert (tmp_path / "broken" / "checkpoints" / checkpoints.FILE).exists()
    assert not (tmp_path / "broken" / "result.json").exists()
    seen = []
    resumed = simulate(
        config, tmp_path / "broken", resume=True, progress_listener=lambda stage, done, *_: seen.append((stage, done))
    )
    assert min(done for stage, done in seen if stage == "rounds") >= number - 2  # nothing before was done again
    heads = [(tmp_path / name / "model" / "head.safetensors").read_bytes() for name in ("whole", "broken")]
    assert heads[0] == heads[1]
    assert resumed.final == whole.final
    assert [entry["events"] for entry in resumed.privacy] == [entry["events"] for entry in whole.privacy]
    assert [row["metrics"] for row in resumed.rounds] == [row["metrics"] for row in whole.rounds]


def test_rounds_that_are_done_again_are_charged_once(tiny, tmp_path):
    """The same seed draws the same noise for the same head: the same release, however often it is made."""
    config = tiny({"run.exact": True, "run.evaluate_every": 4})
    with pytest.raises(Stop):
        simulate(config, tmp_path / "broken", progress_listener=stop_at(7))  # goes on from round 4
    resumed = simulate(config, tmp_path / "broken", resume=True)
    whole = simulate(config, tmp_path / "whole")
    assert resumed.final == whole.final
    for name in ("whole", "broken"):
        with Ledger(tmp_path / name / "holders" / "holder-00000" / "ledger.sqlite") as ledger:
            rounds = [one.round for one in ledger.entries() if one.kind == "reserve"]
            assert rounds == list(range(1, 9))
            ledger.verify()


def test_without_its_memory_a_strategy_ends_elsewhere(tiny, tmp_path, monkeypatch):
    """The twin of the test above: forgetting the momentum must show."""
    config = tiny({"run.exact": True, "run.evaluate_every": 2})
    simulate(config, tmp_path / "whole")
    with pytest.raises(Stop):
        simulate(config, tmp_path / "broken", progress_listener=stop_at(5))
    monkeypatch.setattr("fedhead.server.app.remember", lambda strategy, memory: None)
    simulate(config, tmp_path / "broken", resume=True)
    heads = [(tmp_path / name / "model" / "head.safetensors").read_bytes() for name in ("whole", "broken")]
    assert heads[0] != heads[1]


def test_another_recipe_is_refused_and_the_checkpoint_stays(tiny, tmp_path):
    with pytest.raises(Stop):
        simulate(tiny(), tmp_path / "run", progress_listener=stop_at(6))
    with pytest.raises(InputError, match="another recipe"):
        simulate(tiny({"privacy.epsilon": 1.0}), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "checkpoints" / checkpoints.FILE).exists()


@pytest.mark.parametrize("run", [simulate, lambda config, out: simulate_seeds(config, 2, out)])
def test_a_run_that_was_stopped_is_not_written_over(tiny, tmp_path, run):
    """Whoever forgets to give `resume` loses nothing: the folder stays as it is, and the run can go on."""
    config = tiny()
    with pytest.raises(Stop):
        simulate(config, tmp_path / "run", progress_listener=stop_at(6))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="it holds a run that was stopped") as caught:
        run(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(simulate(config, tmp_path / "run", resume=True).rounds) == 8


@pytest.mark.parametrize("damage", [b"", b"garbage", "cut"])
def test_a_broken_checkpoint_is_refused_in_one_line(tiny, tmp_path, damage):
    with pytest.raises(Stop):
        simulate(tiny(), tmp_path / "run", progress_listener=stop_at(6))
    path = tmp_path / "run" / "checkpoints" / checkpoints.FILE
    path.write_bytes(path.read_bytes()[:-7] if damage == "cut" else damage)
    with pytest.raises(InputError) as caught:
        simulate(tiny(), tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)


def test_no_checkpoint_starts_at_the_beginning(tiny, tmp_path):
    assert Checkpoint.read(tmp_path, "x") is None
    assert len(simulate(tiny({"training.rounds": 2}), tmp_path / "run", resume=True).rounds) == 2


def test_a_simulation_does_not_wait_for_room_on_a_full_disk(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_aside", full)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(RunError, match="No space left"):
        simulate(tiny({"run.evaluate_every": 1}), tmp_path / "out")
