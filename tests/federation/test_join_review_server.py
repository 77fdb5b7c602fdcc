"""A malicious server against a joined holder: files that it names, and times that it could read off replies."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import save_file

from fedhead.client import app as client_app
from fedhead.client import timing
from fedhead.client.deployed import own_recipe
from fedhead.client.holder import load_holder
from fedhead.client.joining import executor, pipe
from fedhead.common import protocol, refusals
from fedhead.common.config import changed
from fedhead.common.errors import InputError
from fedhead.common.models.weights import resolve


def recipe_of(holder, **model):
    return changed(holder.config, {f"model.{name}": value for name, value in model.items()})


@pytest.mark.parametrize("inside", ["/{secret}", "/{secret}/", "x/../../{secret}", "/../{secret}"])
def test_a_file_outside_of_a_package_is_not_for_a_server_to_name(deployed, inside):
    holder = deployed()
    secret = holder.folder / "private.safetensors"
    save_file({"weight": torch.ones(1)}, secret)
    weights = "pkg://torch/" + inside.format(secret=secret)
    with pytest.raises(InputError, match=r"model\.weights of a recipe is"):
        own_recipe(load_holder(holder.file), recipe_of(holder, weights=weights))


def test_a_packages_own_file_is_still_for_a_server_to_name(deployed):
    holder = deployed()
    weights = "pkg://torch/version.py"
    assert resolve(weights, holder.folder).is_file()
    assert own_recipe(load_holder(holder.file), recipe_of(holder, weights=weights)).model.weights == weights


@pytest.mark.parametrize("name", ["models/own", "models/../models/own", "nothing/../models/own"])
def test_a_folder_beside_the_holders_file_is_not_for_a_server_to_name(deployed, name):
    """Relative names start at the holder's file when the backbone is loaded, wherever join was started."""
    holder = deployed()
    own = holder.folder / "models" / "own"
    own.mkdir(parents=True)
    (own / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="a folder on this machine is not for a server to name"):
        own_recipe(load_holder(holder.file), recipe_of(holder, backbone=f"transformers:{name}"))


@pytest.mark.parametrize("kind", ["released", "refused", "query", "not ready"])
def test_a_reply_is_made_when_it_leaves(deployed, monkeypatch, kind):
    """A reply carries when it was made: made before the wait, it would tell how long the work took."""
    waited = []

    def wait(arrived, reply_at):
        waited.append((reply_at, time.time()))

    monkeypatch.setattr(client_app, "wait_until", wait)
    holder = deployed(limits="reply_at = 7.5\nclipping_norm_max = 0.5")
    if kind == "not ready":
        holder.config = changed(holder.config, {"task.labels": ["a", "b"]})
    message = holder.message(holder.request(clipping_norm=0.6 if kind == "refused" else 0.3))
    if kind == "query":
        message.metadata.message_type = "query"
    reply = holder.send(message)
    assert reply.has_error() == (kind in ("refused", "not ready"))
    ((reply_at, when),) = waited
    assert reply_at == 7.5
    assert reply.metadata.created_at >= when


def test_a_file_that_can_not_be_read_any_more_is_no_reason_to_fail(deployed, monkeypatch):
    monkeypatch.setattr(client_app, "wait_until", lambda *_: None)
    holder = deployed()
    holder.file.write_text("name = ")
    assert holder.code_of(holder.ask()) == refusals.NOT_READY


class Handed:
    """A task that keeps the reply."""

    def __init__(self, message, context):
        self.message, self.context, self.reply = message, context, None

    def pull(self, holder):
        return self.message, self.context

    def push(self, reply):
        self.reply = reply

    def finish(self, good):
        assert good


@pytest.mark.parametrize("kind", ["released", "refused", "failed"])
def test_a_reply_carries_the_times_of_its_request_and_none_of_its_own(deployed, monkeypatch, kind):
    """created_at and ttl of a reply are in microseconds: they would say how long the training took."""
    monkeypatch.setattr(pipe, "emit", lambda *_, **__: None)
    holder = deployed(limits="clipping_norm_max = 0.5")
    message = holder.message(holder.request(clipping_norm=0.6 if kind == "refused" else 0.3))
    message.metadata.created_at, message.metadata.ttl = time.time() - 3.25, 300.0

    def app(message, context):
        if kind == "failed":
            raise ValueError("record 7")
        return holder.send(message)

    task = Handed(message, None)
    executor.one(task, str(holder.file), app)
    assert task.reply.has_error() == (kind != "released")
    assert task.reply.metadata.created_at == message.metadata.created_at
    assert task.reply.metadata.ttl == message.metadata.ttl


@pytest.mark.parametrize(
    ("created_at", "ttl", "late"),
    [
        (0.0, math.inf, False), (math.nan, 10.0, True), (0.0, math.nan, True), (math.inf, -math.inf, True),
        (0.0, 1e308, False), (-1e308, 10.0, True), (0.0, -1.0, True),
    ],
)  # fmt: skip
def test_times_that_are_no_times_are_over(deployed, created_at, ttl, late):
    holder = deployed()
    message = holder.message(holder.request())
    message.metadata.created_at, message.metadata.ttl = created_at, ttl
    assert timing.over(message) is late
    if late:
        assert holder.code_of(holder.send(message)) == refusals.STALE_ROUND
        assert not holder.ledger.exists()


def test_features_of_many_recipes_do_not_fill_the_disk(deployed):
    """Each recipe has features of its own; a server that names one after the other keeps a few, not all."""
    from fedhead.client.keeping import MOST_SETS

    holder = deployed()
    features = holder.folder / "state" / "features"
    for number in range(MOST_SETS + 3):
        old = features / f"{number:064x}"
        old.mkdir(parents=True)
        (old / "values.bin").write_bytes(b"x" * 100)
        (features / f"{number:064x}.lock").touch()
    assert not holder.ask().has_error()
    sets = [one for one in features.iterdir() if one.is_dir()]
    assert len(sets) == MOST_SETS
    assert any((one / "manifest.json").is_file() for one in sets)  # the one in use
    assert len(list(features.glob("*.lock"))) <= MOST_SETS
    reply = holder.ask(round=2)
    assert protocol.read_mark(reply) is not None


def test_the_set_in_use_is_the_last_to_go(tmp_path):
    import os

    from fedhead.client.keeping import MOST_SETS, keep_newest

    names = [f"{number:064x}" for number in range(MOST_SETS + 1)]
    for age, name in enumerate(names):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    keep_newest(tmp_path, names[-1])  # the oldest, but in use from now on
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([*names[: MOST_SETS - 1], names[-1]])
    keep_newest(tmp_path, "f" * 64)  # one that is to be computed: room is made before
    assert (tmp_path / names[-1]).is_dir()
    assert len(list(tmp_path.iterdir())) == MOST_SETS - 1
    keep_newest(tmp_path / "nothing", "f" * 64)


@pytest.mark.parametrize(
    ("image", "length", "batch"),
    [({}, 128, 64), ({"size": 64}, 16, 64), ({"size": 448}, 128, 16), ({"size": 2048}, 128, 1), ({}, 8192, 1)],
)
def test_a_recipe_can_not_make_a_batch_of_features_larger_than_a_usual_one(deployed, image, length, batch):
    holder = deployed()
    recipe = recipe_of(holder, image=image, max_length=length, **{"features.batch_size": 10**9})
    assert own_recipe(load_holder(holder.file), recipe).model.features.batch_size == batch


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_the_share_that_is_kept_apart_does_not_tell_how_many_records_there_are(deployed, monkeypatch, fraction):
    """Whether a holder has too many records is one answer, whatever share a recipe keeps apart."""
    from fedhead.common.privacy import lattice

    monkeypatch.setattr(lattice, "MOST_RECORDS", 1000)  # the holder has 1,797
    metrics = {"noise_multiplier": 10.0, "fraction": fraction, "every": 1}
    holder = deployed(limits="[limits.release]\nmetrics = true", changes={"metrics": metrics})
    assert holder.code_of(holder.ask()) == refusals.NOT_READY
