"""holder.toml: every fault at once, one line each, and paths that start from the file."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import BaseModel

from fedhead.client.holder import HolderFile, address_of, load_holder, make_holder
from fedhead.common.config.tables import tables_of
from fedhead.common.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "holder.md"
BLOCK = re.compile(r"^~~~toml\n(.*?)^~~~$", re.MULTILINE | re.DOTALL)
SMALL = {"name": "st-mary", "data": {"source": "csv:r.csv"}, "budget": {"epsilon": 8.0}}
WHOLE = """
name = "st-mary"
server = "fl.example.org:8443"
ca = "ca.crt"
key = "st-mary.key"
[data]
source = "parquet:records.parquet"
columns = { text = "note", label = "code" }
person = "patient_id"
[budget]
domain = "cardiology-notes"
epsilon = 8.0
delta = 1e-6
per_run = { epsilon = 2.0 }
[limits]
units = ["person"]
tasks = ["classification"]
backbones = ["sha256:%s"]
clipping_norm_max = 1.0
noise_multiplier_min = 1.0
least_records = 500
release = { metrics = false, declared_records = 4000 }
allow_seeded_noise = false
reply_at = 0.0
[storage]
folder = "state"
""" % ("ab" * 32)


def merged(base: dict, changes: dict) -> dict:
    inner = {key: merged(base.get(key, {}), value) for key, value in changes.items() if isinstance(value, dict)}
    return {**base, **changes, **inner}


def faults(changes: dict, base: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        make_holder(merged(SMALL, changes), base)
    return caught.value.faults


def test_the_whole_file_loads_and_paths_start_at_it(tmp_path):
    for name in ("ca.crt", "st-mary.key"):
        (tmp_path / name).touch()
    (tmp_path / "holder.toml").write_text(WHOLE)
    holder = load_holder(tmp_path / "holder.toml")
    assert holder.base == tmp_path
    assert holder.folder == tmp_path / "state"
    assert holder.ledger == tmp_path / "state" / "ledger.sqlite"
    assert (holder.budget.domain, holder.budget.delta) == ("cardiology-notes", 1e-6)
    assert holder.limits.release.declared_records == 4000
    terms = holder.budget.terms()
    assert (terms.epsilon, terms.delta, terms.run_epsilon) == (8.0, 1e-6, 2.0)


def test_a_small_file_has_careful_defaults(tmp_path):
    holder = make_holder(SMALL, tmp_path)
    assert holder.limits.units == ["record", "person"]
    assert not holder.limits.allow_seeded_noise
    assert not holder.limits.release.metrics
    assert holder.folder == tmp_path / "state"


def test_absolute_paths_stay(tmp_path):
    holder = make_holder(merged(SMALL, {"storage": {"folder": str(tmp_path / "kept")}}), Path("elsewhere"))
    assert holder.folder == tmp_path / "kept"


def test_all_faults_are_reported_at_once(tmp_path):
    found = faults(
        {
            "ca": "missing.crt",
            "nam": "typo",
            "budget": {"epsilon": 1.0, "per_run": {"epsilon": 2.0}},
            "limits": {"clipping_norm_max": 0.0, "unit": ["person"]},
            "data": {"source": "csv:r.csv", "columns": {"text": "t", "image": "t"}},
        },
        tmp_path,
    )
    named = sorted(line.split(" is ")[0] for line in found)
    assert named == ["budget.per_run.epsilon", "ca", "data.columns", "limits.clipping_norm_max", "limits.unit", "nam"]
    assert any('Did you mean "units"?' in line for line in found)


@pytest.mark.parametrize(
    ("changes", "setting", "words"),
    [
        ({"name": ""}, "name", "st-mary|holder.md"),
        ({"name": "a/b"}, "name", "letters, digits"),
        ({"name": 3}, "name", "text"),
        ({"server": "no port"}, "server", "a host, a colon and a port"),
        ({"server": "fl.example.org:0"}, "server", "from 1 to 65535"),
        ({"server": "fl.example.org:65536"}, "server", "from 1 to 65535"),
        ({"server": "https://fl.example.org:8443"}, "server", "without a scheme"),
        ({"metrics": "9102"}, "metrics", "a host, a colon and a port"),
        ({"metrics": "127.0.0.1:0"}, "metrics", "from 1 to 65535"),
        ({"metrics": "0.0.0.0:9102"}, "metrics", "loopback"),
        ({"metrics": "192.0.2.7:9102"}, "metrics", "loopback"),
        ({"metrics": "monitor.example.org:9102"}, "metrics", "loopback"),
        ({"key": "missing.key"}, "key", "no such file"),
        ({"data": {"source": "records.csv"}}, "data.source", "a kind, a colon and a path"),
        ({"data": {"person": "label"}}, "data.person", "column of its own"),
        ({"data": {"columns": {"text": "t"}, "person": "t"}}, "data.person", "column of its own"),
        ({"data": {"columns": {"text": "label"}}}, "data.columns.text", "the label's"),
        ({"data": {"columns": {"who": "t"}}}, "data.columns.who", "role"),
        ({"data": {"labels": ["a"]}}, "data.labels", "at least 2"),
        ({"data": {"labels": ["a", "a"]}}, "data.labels", "listed once"),
        ({"budget": {"epsilon": 0.0}}, "budget.epsilon", "more than 0"),
        ({"budget": {"epsilon": float("inf")}}, "budget.epsilon", "finite"),
        ({"budget": {"epsilon": "8"}}, "budget.epsilon", "number"),
        ({"budget": {"delta": 1.0}}, "budget.delta", "less than 1"),
        ({"budget": {"poisson_share": 1.5}}, "budget.poisson_share", "at most 1"),
        ({"budget": {"per_run": {"epsilon": 8.5}}}, "budget.per_run.epsilon", "at most budget.epsilon, 8"),
        ({"budget": {"per_run": {"epsilon": 1.0, "delta": 1e-4}}}, "budget.per_run.delta", "at most budget.delta"),
        ({"budget": {"domain": "a", "disjoint_from": ["a"]}}, "budget.disjoint_from", "from itself"),
        ({"budget": {"disjoint_from": ["../b"]}}, r"budget.disjoint_from\[0\]", "name of a domain"),
        ({"budget": {"disjoint_from": ["b", "b"]}}, "budget.disjoint_from", "listed once"),
        (
            {"budget": {"poisson_share": 1.0}, "limits": {"release": {"metrics": True}}},
            "budget.poisson_share",
            "counts are not paid",
        ),
        ({"limits": {"units": ["person"]}}, "limits.units", "needs data.person"),
        ({"limits": {"units": []}}, "limits.units", "at least 1"),
        ({"limits": {"units": ["patient"]}}, r"limits.units\[0\]", "one of"),
        ({"limits": {"tasks": []}}, "limits.tasks", "every request"),
        ({"limits": {"backbones": ["md5:00"]}}, r"limits.backbones\[0\]", "64 hexadecimal digits"),
        ({"limits": {"noise_multiplier_min": -1.0}}, "limits.noise_multiplier_min", "more than 0"),
        ({"storage": {"folder": ""}}, "storage.folder", "a path"),
        ({"storage": {"folder": "a\0b"}}, "storage.folder", "a path"),
    ],
)
def test_each_rule(changes, setting, words, tmp_path):
    (line,) = faults(changes, tmp_path)
    assert re.match(rf"{setting} is .*({words})", line), line
    assert "recipe" not in line


@pytest.mark.parametrize("address", ["127.0.0.1:9102", "127.1.2.3:1", "localhost:65535", "[::1]:9102"])
def test_figures_can_be_read_on_this_machine_alone(address):
    assert make_holder({**SMALL, "metrics": address}).metrics == address


@pytest.mark.parametrize(
    ("text", "host", "port"), [("fl.example.org:8443", "fl.example.org", 8443), ("[2001:db8::7]:1", "2001:db8::7", 1)]
)
def test_an_address_is_a_host_and_a_port(text, host, port):
    assert address_of(text) == (host, port)


@pytest.mark.parametrize("name", ["name", "data", "budget"])
def test_what_must_be_given(name):
    with pytest.raises(ConfigError) as caught:
        make_holder({key: value for key, value in SMALL.items() if key != name})
    (line,) = caught.value.faults
    assert line.startswith(f"{name} is missing")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "no valid TOML"),
        ("a = " + "[" * 5000, "no valid TOML"),
        ("a = 1" + "0" * 5000, "no valid TOML"),
        ("\xff", "no valid TOML"),
    ],
)
def test_what_is_no_toml_is_one_line(tmp_path, text, words):
    (tmp_path / "h.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_holder(tmp_path / "h.toml")
    (line,) = caught.value.faults
    assert words in line


def test_what_can_not_be_read_is_one_line(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name, words in (("none.toml", "no such file"), (".", "read"), ("binary.toml", "read")):
        with pytest.raises(ConfigError) as caught:
            load_holder(tmp_path / name)
        (line,) = caught.value.faults
        assert words in line


TOML = st.recursive(
    st.none().map(lambda _: 0) | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("name", "server", "ca", "key", "data", "budget", "limits", "storage", "other")


@examples(derandomize=True, max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), TOML, max_size=5), st.booleans())
def test_any_nonsense_is_told_in_lines_never_a_traceback(raw, whole):
    given_ = {**SMALL, **raw} if whole else raw
    found: tuple[str, ...] = ("name is good",)
    try:
        make_holder(given_)
    except ConfigError as error:
        found = error.faults
    assert found
    assert all(" is " in line for line in found)


def settings(model: type[BaseModel] = HolderFile, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, info in model.model_fields.items():
        tables = tables_of(info.annotation)
        found += [f"{prefix}{name}"] if not tables else []
        found += [path for table in tables for path in settings(table, f"{prefix}{name}.")]
    return found


def test_the_page_names_every_setting_and_no_other():
    listed = re.findall(r"^\| `([a-z_.]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == settings()


def test_the_page_s_examples_load(tmp_path):
    for name in ("ca.crt", "st-mary.key"):
        (tmp_path / name).touch()
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 2
    for body in blocks:
        assert make_holder(tomllib.loads(body), tmp_path).budget.epsilon > 0
