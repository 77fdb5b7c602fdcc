"""The recipe: what is accepted, what is refused, and how a refusal reads."""

import copy
import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.config import (
    RunConfig,
    builtin_recipes,
    changed,
    find_recipe,
    from_json,
    load_recipe,
    make_config,
    to_json,
)
from fedhead.common.config.reference import main, reference
from fedhead.common.errors import ConfigError

MINIMAL = {
    "task": {"labels": ["a", "b"]},
    "model": {"backbone": "torchvision:resnet18"},
    "data": {"source": "csv:x.csv"},
    "privacy": {"epsilon": 3.0},
}


def faults(raw):
    with pytest.raises(ConfigError) as caught:
        make_config(raw)
    assert caught.value.exit_status == 2
    assert str(caught.value).splitlines() == list(caught.value.faults)
    return list(caught.value.faults)


def faults_or_none(raw):
    try:
        make_config(raw)
    except ConfigError as error:
        return error.faults
    return None


def with_(**sections):
    raw = copy.deepcopy(MINIMAL)
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return raw


def test_four_settings_make_a_recipe():
    config = make_config(MINIMAL)
    assert config.training.rounds == 60
    assert config.strategy.kind == "fedavgm"
    assert config.privacy.mechanism == "full-batch"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"privacy": {"epsilon": 0}}, "privacy.epsilon is 0: it must be more than 0."),
        ({"privacy": {"epsilon": float("nan")}}, "privacy.epsilon is nan: it must be a finite number."),
        ({"privacy": {"epsilon": "3"}}, 'privacy.epsilon is "3": it must be a number.'),
        ({"privacy": {"delta": 1.0}}, "privacy.delta is 1.0: it must be less than 1."),
        ({"privacy": {"clipping_norm": -1.0}}, "privacy.clipping_norm is -1.0: it must be more than 0."),
        ({"privacy": {"epsilom": 1.0}}, 'privacy.epsilom is 1.0: there is no such setting. Did you mean "epsilon"?'),
        ({"privacy": {"epsilon": None}}, "privacy.epsilon is missing"),
        ({"privacy": {"noise_multiplier": 1.0}}, "privacy.noise_multiplier is 1.0: it can't be given together"),
        ({"privacy": {"mechanism": "none"}}, "privacy.epsilon is 3.0: it must be left out"),
        ({"privacy": {"mechanism": "poisson"}}, "privacy.sample_rate is missing"),
        ({"privacy": {"sample_rate": 0.1}}, "privacy.sample_rate is 0.1: it has no meaning"),
        ({"privacy": {"unit": "person"}}, 'privacy.person is missing: it must name a column'),
        (
            {"privacy": {"unit": "person", "person": "who"}, "data": {"columns": {"text": "who"}}},
            'privacy.person is "who": it must be a column of its own',
        ),
        (
            {"privacy": {"unit": "person", "person": "who"}, "model": {"unfreeze": 1}},
            'model.unfreeze is 1: it must be 0 when privacy.unit is "person"',
        ),
        (
            {"privacy": {"unit": "holder", "mechanism": "poisson", "sample_rate": 0.1}},
            'privacy.mechanism is "poisson": the unit "holder" claims no amplification',
        ),
        (
            {"privacy": {"unit": "holder"}, "strategy": {"kind": "median"}},
            'strategy.kind is "median": it needs single updates',
        ),
        ({"privacy": {"unit": "holder", "metrics": {}}}, "privacy.metrics is given: its noise hides records"),
        ({"privacy": {"metrics": {"every": 61}}}, "privacy.metrics.every is 61: it must be at most training.rounds"),
        ({"holders": {"budget": {"epsilon": 0}}}, "holders.budget.epsilon is 0"),
        (
            {"holders": {"budget": {"epsilon": 1.0, "per_run": {"epsilon": 2.0}}}},
            "holders.budget.per_run.epsilon is 2.0: it must be at most holders.budget.epsilon, 1",
        ),
        (
            {"holders": {"budget": {"epsilon": 1.0, "poisson_share": 1.0}}},
            "holders.budget.poisson_share is 1.0: it must be less than 1",
        ),
        ({"training": {"rounds": 0}}, "training.rounds is 0: it must be at least 1."),
        ({"training": {"rounds": 2.5}}, "training.rounds is 2.5: it must be a whole number."),
        ({"training": {"rounds": 3, "schedule": {"warmup": 3}}}, "training.schedule.warmup is 3: it must be less than"),
        ({"training": {"optimizer": {"kind": "adam", "learning_rate": 0}}}, "training.optimizer.learning_rate is 0"),
        ({"training": {"optimizer": {"kind": "adamx"}}}, 'training.optimizer.kind is "adamx": its kind must be one of'),
        ({"task": {"labels": ["a", "a"]}}, 'task.labels is ["a"]: a label must be listed once.'),
        ({"task": {"labels": ["a", 3]}}, "task.labels[1] is 3: it must be text."),
        ({"task": {"kind": "foo"}}, 'task.kind is "foo"'),
        ({"model": {"backbone": "resnet18"}}, 'model.backbone is "resnet18": it must be torchvision:NAME'),
        ({"model": {"sha256": "abc"}}, 'model.sha256 is "abc"'),
        ({"model": {"head": {"kind": "mlp", "hidden": []}}}, "model.head.hidden is []: it must have at least 1"),
        ({"data": {"source": "reviews.csv"}}, 'data.source is "reviews.csv"'),
        ({"data": {"test": {}}}, "data.test is {}: it must have exactly one of"),
        ({"data": {"test": {"fraction": 0.2, "source": "csv:y.csv"}}}, "data.test is "),
        ({"data": {"columns": {"text": "t", "image": "i"}}}, "data.columns is "),
        ({"data": {"columns": {"word": "t"}}}, 'data.columns.word is "t"'),
        ({"holders": {"per_round": 11}}, "holders.per_round is 11: it must be at most holders.count, 10."),
        ({"holders": {"partition": {"kind": "sizes", "sizes": [3, 4]}}}, "holders.partition.sizes is [3, 4]"),
        ({"strategy": {"kind": "krum", "malicious": 8}}, "strategy.malicious is 8"),
        ({"strategy": {"kind": "fedavg", "momentum": 0.5}}, "strategy.momentum is 0.5: there is no such setting."),
        ({"holders": {"partition": {"kind": "sizes"}}}, "holders.partition.sizes is missing: it must be given."),
        ({"training": {"optimizer": {"learning_rate": -1.0}}}, "training.optimizer.learning_rate is -1.0: it must be"),
        ({"strategy": {"momentum": 1.0}}, "strategy.momentum is 1.0: it must be less than 1."),
        ({"run": {"seed": -1}}, "run.seed is -1: it must be at least 0."),
        ({"surprise": {"x": 1}}, "surprise is "),
    ],
)  # fmt: skip
def test_each_fault_names_setting_value_rule_and_remedy(sections, expected):
    found = faults(with_(**sections))
    assert len(found) == 1, found
    assert found[0].startswith(expected)
    assert found[0].endswith((".", "?"))
    assert "\n" not in found[0]


def test_a_table_that_does_not_say_its_kind_has_the_default_one():
    config = make_config(
        with_(
            training={"optimizer": {"learning_rate": 2.0}}, strategy={"momentum": 0.5}, model={"head": {"bias": False}}
        )
    )
    assert config.training.optimizer.kind == "sgd"
    assert config.strategy.kind == "fedavgm"
    assert config.model.head.kind == "linear"


def test_all_faults_at_once():
    raw = with_(
        privacy={"epsilon": 0, "delta": 2.0},
        training={"rounds": 0},
        holders={"count": 2, "per_round": 5},
        extra={"x": 1},
    )
    found = faults(raw)
    for name in ("privacy.epsilon", "privacy.delta", "training.rounds", "holders.per_round", "extra"):
        assert any(line.startswith(name) for line in found), (name, found)


def test_nothing_is_a_recipe_with_what_is_missing():
    found = faults({})
    assert [line.split(" is ")[0] for line in found] == ["task", "model", "data", "privacy.epsilon"]


def test_overrides_are_read_as_toml_or_as_text(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text(
        '[task]\nlabels = ["a", "b"]\n[model]\nbackbone = "torchvision:resnet18"\n[data]\nsource = "csv:x.csv"\n'
    )
    config = load_recipe(
        path, ["privacy.epsilon=2", "model.pooling=cls", 'holders.partition={kind="dirichlet", alpha=0.3}']
    )
    assert config.privacy.epsilon == 2
    assert config.model.pooling == "cls"
    assert config.holders.partition.alpha == 0.3
    assert config.base == tmp_path.resolve()


def test_an_empty_override_takes_the_setting_out():
    config = find_recipe("quickstart", ["privacy.epsilon=", "privacy.mechanism=none", "data.declared_records="])
    assert config.privacy.epsilon is None
    assert config.data.declared_records is None


@pytest.mark.parametrize("override", ["privacy.epsilon", "=3", "task.labels.x=1"])
def test_bad_overrides_are_one_line(tmp_path: Path, override: str):
    path = tmp_path / "r.toml"
    path.write_text('[task]\nlabels = ["a", "b"]\n')
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, [override])
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("value", ["[" * 5000, "1" + "0" * 5000])
def test_an_override_beyond_all_bounds_is_one_line(value: str):
    with pytest.raises(ConfigError) as caught:
        find_recipe("quickstart", [f"privacy.epsilon={value}"])
    (line,) = caught.value.faults
    assert line.startswith("privacy.epsilon is ")
    assert len(line) < 300


def test_files_that_are_no_recipe(tmp_path: Path):
    contents = {
        "missing.toml": None, "broken.toml": b"[task", "binary.toml": b"\xff\xfe\x00",
        "deep.toml": b"a = " + b"[" * 5000, "long.toml": b"a = 1" + b"0" * 5000,
    }  # fmt: skip
    for name, content in contents.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_recipe(path)
        assert len(caught.value.faults) == 1
        assert str(path) in caught.value.faults[0]


def test_json_round_trip():
    config = make_config(
        with_(
            privacy={"mechanism": "poisson", "sample_rate": 0.1},
            training={"optimizer": {"kind": "adam", "betas": [0.8, 0.9]}},
            strategy={"kind": "fedyogi", "tau": 0.01},
            model={"head": {"kind": "mlp", "hidden": [8, 4]}},
        ),
        base=Path("/somewhere"),
    )
    again = from_json(to_json(config))
    assert again == config
    assert again.base == config.base
    assert to_json(again) == to_json(config)


def test_changed_checks_anew():
    config = make_config(MINIMAL)
    assert changed(config, {"privacy.epsilon": 1.0}).privacy.epsilon == 1.0
    with pytest.raises(ConfigError):
        changed(config, {"privacy.epsilon": -1.0})


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=True),
    st.text(max_size=4),
    st.just([]),
    st.just({}),
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.sampled_from(sorted(RunConfig.model_fields)), st.text(min_size=1, max_size=6), SCALARS)
def test_no_value_crashes_the_report_of_faults(section, key, value):
    raw = copy.deepcopy(MINIMAL)
    keys = list(RunConfig.model_fields[section].annotation.model_fields) if section != "strategy" else ["kind", "beta"]
    for name in [*keys, key]:
        one = copy.deepcopy(raw)
        one.setdefault(section, {})[name] = value
        found = faults_or_none(one)
        assert found is None or (found and all("\n" not in line for line in found))


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_built_in_recipes_are_valid(name):
    config = find_recipe(name)
    assert config.privacy.epsilon == 3.0
    assert config.data.declared_records is not None


def test_a_folder_does_not_hide_a_built_in_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_recipe("quickstart").task.labels == ["negative", "positive"]
    (tmp_path / "digits").write_text("[task]\n")
    with pytest.raises(ConfigError):
        find_recipe("digits")  # a file of that name is the user's own


def test_the_three_recipes_exist():
    assert {"quickstart", "digits", "cifar10"} <= set(builtin_recipes())


def test_reference_page_is_what_the_schema_says(tmp_path: Path):
    page = Path(__file__).parents[3] / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == reference(), "run `just docs`"
    stale = tmp_path / "recipes.md"
    stale.write_text("old")
    assert main([str(stale), "--check"]) == 1
    assert main([str(stale)]) == 0
    assert main([str(stale), "--check"]) == 0


def test_reference_page_writes_values_as_a_recipe_does():
    rows = re.findall(r"^\| `(\S+)` \| (.*?) \| `(.+?)` \|", reference(), re.MULTILINE)
    read = {}
    for setting, kind, shown in rows:
        if kind.startswith(("list of", "whole number", "number", "true or false")) or shown.startswith("{"):
            (read[setting],) = tomllib.loads(f"value = {shown}").values()
    assert read["data.test"] == {"fraction": 0.2}
    assert read["training.optimizer.betas"] == [0.9, 0.999]
    assert read["holders.limits.units"] == ["record", "person"]
    assert read["training.chunk"] == 4096


def test_reference_page_writes_whole_bounds_in_full():
    text = reference()
    assert "whole number ≥ 1, ≤ 1048576 |" in text
    assert "whole number ≥ 0, < 9223372036854775808 |" in text
    assert "number ≥ 0, < 0.5 |" in text
    assert re.findall(r"[<>≤≥] \d[\d.]*e", text) == []


def test_reference_page_names_every_setting():
    text = reference()

    def walk(value, prefix):
        for key, inner in value.items():
            path = f"{prefix}.{key}" if prefix else key
            if isinstance(inner, dict) and inner:
                walk(inner, path)
            elif prefix:
                assert f"`{path}`" in text, path

    walk(json.loads(make_config(MINIMAL).model_dump_json()), "")
