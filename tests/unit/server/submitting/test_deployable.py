"""Which recipes may be submitted: what only a simulation can do is refused before anything is sent."""

import pytest

from fedhead.common.config import make_config
from fedhead.common.errors import ConfigError
from fedhead.server.keys import make_keys
from fedhead.server.server_file import load_server
from fedhead.server.submitting.deployable import deployable


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployable")
    make_keys(folder / "keys", ["north", "south", "west"])
    (folder / "server.toml").write_text(
        'certificates = "keys"\nholders = ["keys/north.pub", "keys/south.pub", "keys/west.pub"]\n'
    )
    return load_server(folder / "server.toml")


def recipe(**changes):
    raw = {
        "task": {"labels": ["no", "yes"]},
        "model": {"backbone": "torchvision:resnet18"},
        "data": {"source": "csv:notes.csv", "test": {"source": "csv:test.csv"}, "declared_records": 1000},
        "privacy": {"epsilon": 3.0},
    }
    for key, value in changes.items():
        table, _, name = key.partition("__")
        raw.setdefault(table, {})
        if value is None:
            raw[table].pop(name, None)
        else:
            raw[table][name] = value
    return make_config(raw)


def test_all_that_are_registered_take_part_and_nothing_is_compared(server):
    found = deployable(recipe(), server)
    assert (found.holders.count, found.run.baseline) == (3, False)
    assert found.training == recipe().training
    assert deployable(recipe(holders__count=3, run__baseline=False), server) == deployable(recipe(), server)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__test": {"fraction": 0.3}}, "data.test.fraction is 0.3: a share of the holders' records"),
        ({"data__test": None}, "data.test.fraction is 0.2: a share of the holders' records"),
        ({"run__baseline": True}, "run.baseline is true: a comparison without privacy is for a simulation"),
        ({"data__declared_records": None}, "data.declared_records is missing: a deployment needs a public constant"),
        ({"privacy__mechanism": "none", "privacy__epsilon": None}, 'privacy.mechanism is "none": a data holder has'),
        ({"model__weights": "w.safetensors"}, 'model.weights is "w.safetensors": a file on the holders\' machines'),
        ({"model__backbone": "transformers:./bert"}, 'model.backbone is "transformers:./bert": a folder on the'),
        ({"holders__count": 5}, "holders.count is 5: server.toml has the keys of 3 holders. Leave it out"),
        ({"holders__per_round": 1}, "holders.per_round is 1: it must be at least least_holders of server.toml, 2"),
    ],
)
def test_what_holders_can_not_do_is_one_line(server, changes, told):
    with pytest.raises(ConfigError) as caught:
        deployable(recipe(**changes), server)
    (line,) = caught.value.faults
    assert line.startswith(told), line
    assert line.endswith(".")


def test_all_faults_are_told_at_once(server):
    with pytest.raises(ConfigError) as caught:
        deployable(recipe(data__test=None, data__declared_records=None, run__baseline=True, holders__count=9), server)
    assert len(caught.value.faults) == 4


def test_weights_of_a_package_are_known_to_everybody(server):
    deployable(recipe(model__weights="pkg://package/file.bin"), server)
