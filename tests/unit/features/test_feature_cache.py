from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedhead.common.config.schema import FeatureSettings
from fedhead.common.features import cache_key, extract
from fedhead.common.features.cache import open_entry

HERE = Path(__file__).parent
SETTINGS = FeatureSettings(batch_size=4)

# A process that computes features; it writes a line to its log file at every batch, and waits there when told to.
PROCESS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
torch.set_num_threads(1)
from fake_backbone import FakeBackbone, sentences, expected
from fedhead.common.config.schema import FeatureSettings
from fedhead.common.features import extract
cache, log, wait = Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
def before(batch):
    with log.open("a") as file: file.write("batch\\n")
    time.sleep(wait)
backbone = FakeBackbone(ragged=True, before_forward=before)
features = extract(backbone, sentences(), cache, FeatureSettings(batch_size=4))
assert torch.equal(features.batch(slice(None))[0].sum(1), expected(sentences()))
"""


def start(cache: Path, log: Path, wait: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(HERE), str(cache), str(log), str(wait)])


def until(ready, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(HERE)
    import fake_backbone

    return fake_backbone


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_two_processes_compute_once(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    one = start(cache, log, 0.05)
    two = start(cache, log, 0.05)
    assert (one.wait(60), two.wait(60)) == (0, 0)
    assert log.read_text().splitlines() == ["batch"] * 10


def test_kill_half_way_leaves_nothing_that_is_read_and_is_cleaned_up(tmp_path: Path, fake) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    process = start(cache, log, 0.3)
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    records = fake.sentences()
    key = cache_key(fake.FakeBackbone(), records, SETTINGS)
    assert [name.endswith(".part") for name in names(cache)].count(True) == 1
    assert open_entry(cache, key) is None
    # Another key's work removes what is left over, and so would the same key's.
    extract(fake.FakeBackbone(digest="other"), records, cache, SETTINGS)
    assert not any(name.endswith(".part") for name in names(cache))
    again = fake.FakeBackbone(ragged=True)
    features = extract(again, records, cache, SETTINGS)
    assert len(again.batches) == 10
    assert torch.equal(features.batch(slice(None))[0].sum(1), fake.expected(records))


def test_a_part_that_is_being_written_is_left_alone(tmp_path: Path, fake) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    process = start(cache, log, 0.3)
    until(log.exists)
    extract(fake.FakeBackbone(digest="other"), fake.sentences(), cache, SETTINGS)
    assert any(name.endswith(".part") for name in names(cache))
    assert process.wait(60) == 0
    assert not any(name.endswith(".part") for name in names(cache))


@pytest.mark.parametrize("name", ["values.bin", "offsets.bin", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "lengthen"])
def test_a_harmed_file_is_noticed_and_rebuilt(tmp_path: Path, fake, name: str, harm: str) -> None:
    records = fake.sentences()
    wanted = extract(fake.FakeBackbone(ragged=True), records, None, SETTINGS)
    extract(fake.FakeBackbone(ragged=True), records, tmp_path, SETTINGS)
    key = cache_key(fake.FakeBackbone(), records, SETTINGS)
    path = tmp_path / key / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    elif harm == "truncate":
        del data[len(data) // 2 :]
    elif harm == "lengthen":
        data += b"more"
    path.unlink() if harm == "remove" else path.write_bytes(bytes(data))
    assert open_entry(tmp_path, key) is None
    again = fake.FakeBackbone(ragged=True)
    features = extract(again, records, tmp_path, SETTINGS)
    assert len(again.batches) == 10
    assert torch.equal(features.values, wanted.values)
    assert open_entry(tmp_path, key) is not None
    assert names(tmp_path) == sorted([key, f"{key}.lock"])


def test_an_entry_under_another_key_is_not_taken(tmp_path: Path, fake) -> None:
    records = fake.sentences()
    extract(fake.FakeBackbone(), records, tmp_path, SETTINGS)
    key = cache_key(fake.FakeBackbone(), records, SETTINGS)
    (tmp_path / key).rename(tmp_path / ("f" * 64))
    assert open_entry(tmp_path, "f" * 64) is None


def test_a_manifest_changed_on_purpose_is_not_taken(tmp_path: Path, fake) -> None:
    records = fake.sentences()
    extract(fake.FakeBackbone(), records, tmp_path, SETTINGS)
    key = cache_key(fake.FakeBackbone(), records, SETTINGS)
    path = tmp_path / key / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["values.bin"]["shape"].reverse()  # the same size, the same bytes
    path.write_text(json.dumps(manifest))
    assert open_entry(tmp_path, key) is None


def test_files_are_flushed_before_the_rename_and_the_folder_after_it(tmp_path: Path, fake, monkeypatch) -> None:
    events: list[str] = []
    flush, rename = os.fsync, Path.rename

    def spy_flush(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        flush(handle)

    def spy_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file was flushed")
    monkeypatch.setattr(os, "fsync", spy_flush)
    monkeypatch.setattr(Path, "rename", spy_rename)
    extract(fake.FakeBackbone(ragged=True), fake.sentences(), tmp_path, SETTINGS)
    at = events.index("rename")
    assert sorted(events[: at - 1]) == ["manifest.json", "offsets.bin", "values.bin"]
    assert events[at - 1].endswith(".part")
    assert events[at + 1 :] == [tmp_path.name]
