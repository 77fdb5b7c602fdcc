"""`~` where a shell leaves it as typed, as in `--out=~/x` or in quotes: it is the user's home everywhere."""

from pathlib import Path
from runpy import run_path

import click
import pytest
import typer

from fedhead.cli import app
from fedhead.common.config import find_recipe

write_recipe = run_path(str(Path(__file__).with_name("tiny_recipe.py")))["write_recipe"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home, another folder than the current one."""
    made = tmp_path / "home"
    made.mkdir()
    write_recipe(made, 60, 3)
    monkeypatch.setenv("HOME", str(made))
    return made


def paths(command, name=""):
    for key, below in getattr(command, "commands", {}).items():
        yield from paths(below, f"{name} {key}")
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            yield pytest.param(parameter, id=f"{name} {parameter.name}".strip())


PATHS = list(paths(typer.main.get_command(app)))


@pytest.mark.parametrize("parameter", PATHS)
def test_every_path_of_every_command_may_start_at_home(home, parameter):
    several = parameter.multiple or parameter.nargs == -1

    def typed(text):
        found = parameter.type_cast_value(click.Context(click.Command("x")), [text] if several else text)
        return str(found[0] if several else found)

    assert typed("~/x/y") == f"{home}/x/y"
    assert [typed(text) for text in ("x/~", "/x", "~nobody-is-called-so/x")] == ["x/~", "/x", "~nobody-is-called-so/x"]


def test_no_command_with_paths_is_left_out():
    names = {parameter.id for parameter in PATHS}
    assert names >= {"submit out", "submit server", "check holder", "simulate state", "plan ledgers", "budget sign",
                     "audit ledger sign", "audit report out", "keys folder", "predict model_dir"}  # fmt: skip


def test_a_run_lies_where_its_folder_was_named(fedhead, home, tmp_path):
    status, _, err = fedhead("simulate", "~/r.toml", "--out=~/o", "--state=~/s")
    assert status == 0, err
    assert (home / "o" / "result.json").is_file()
    assert (home / "s").is_dir()
    assert not (tmp_path / "~").exists()
    status, _, err = fedhead("simulate", "~/r.toml", "--out=~/o")
    assert (status, "it already holds a run" in err) == (2, True)
    status, out, err = fedhead("predict", "~/o/model", "~/v.csv", "--allow-modules", "--column=x*")
    assert (status, out.startswith("input,label")) == (0, True), err


def test_a_recipe_in_the_home_is_read_with_its_folder(home):
    assert find_recipe("~/r.toml").base == home


def test_a_coordinators_file_is_looked_for_at_home(fedhead, home):
    for arguments in (["submit", "digits", "--out=~/x"], ["status"], ["stop"]):
        _, _, err = fedhead(*arguments, "--server=~/server.toml")
        assert f'SERVER is "{home}/server.toml": there is no such file' in err
