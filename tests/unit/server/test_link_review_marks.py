"""What was seen of a ledger is never forgotten for an older one."""

from fedhead.common.privacy.ledger import Mark
from fedhead.server.marks import read_marks, write_marks


def test_a_run_that_goes_on_from_an_old_checkpoint_keeps_newer_marks(tmp_path):
    path = tmp_path / "marks.json"
    write_marks(path, {"north": Mark(30, "a" * 64), "south": Mark(2, "b" * 64)})
    write_marks(path, {"north": Mark(5, "c" * 64), "south": Mark(3, "d" * 64)})
    assert read_marks(path) == {"north": Mark(30, "a" * 64), "south": Mark(3, "d" * 64)}
