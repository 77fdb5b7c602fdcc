"""The documents are true as far as a machine can tell: examples parse, recipes are valid, code runs, links lead."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedhead.common.config import load_recipe, make_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")
FILE = re.compile(r"# (\S+\.(?:py|toml))\n")
WHOLE = {"task", "model", "data"}


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (path.name, body)
        for path in PAGES
        for found, body in BLOCK.findall(path.read_text(encoding="utf-8"))
        if found == language
    ]


def named_files(page: str) -> dict[str, str]:
    return {
        match[1]: body
        for language in ("python", "toml")
        for name, body in blocks(language)
        if name == page and (match := FILE.match(body))
    }


def test_examples_are_found():
    assert len(blocks("toml")) > 8
    assert len(blocks("python")) > 2


@pytest.mark.parametrize(("page", "body"), blocks("python"))
def test_python_parses(page: str, body: str):
    assert ast.parse(body).body


@pytest.mark.parametrize(("page", "body"), blocks("toml"))
def test_toml_is_a_recipe_or_a_part_of_one(page: str, body: str):
    given = tomllib.loads(body)
    rest = {
        "task": {"labels": ["a", "b"]},
        "model": {"backbone": "torchvision:resnet18"},
        "data": {"source": "csv:a.csv"},
        "privacy": {"epsilon": 1.0},
    }
    config = make_config(given if given.keys() >= WHOLE else {**rest, **given})
    assert given.keys() <= config.model_fields_set


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    targets = [target for target, _ in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_readme_has_the_two_commands_on_lines_of_their_own():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 'pip install -e ".[demo]" && fedhead simulate quickstart' in lines
    assert 'pip install -e ".[test]" && pytest' in lines


def test_readme_lists_the_folders_that_there_are():
    (tree,) = [body for page, body in blocks("") if page == "README.md" and body.startswith("fedhead/")]
    top = set(re.findall(r"^(\w+)/", tree, re.MULTILINE))
    inside: dict[str, set[str]] = {}
    for indent, name in re.findall(r"^( *)(\w+)/", tree, re.MULTILINE):
        if not indent:
            here = inside.setdefault(name, set())
        else:
            here.add(name)
    assert top >= {"fedhead", "common", "client", "server", "simulations", "docs", "tests"}
    assert [name for name in top if not (ROOT / name).is_dir()] == []
    for name in ("common", "client", "server"):
        assert inside[name] == {path.parent.name for path in (ROOT / name).glob("*/__init__.py")}


def test_readme_shows_output_of_the_quickstart_as_it_is():
    from fedhead import find_recipe

    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    recipe = find_recipe("quickstart")
    assert f"│holder-{recipe.holders.count - 1:05d} │" in shown  # the pasted output is one of this recipe
    assert f"over {recipe.training.rounds} rounds" in shown


def test_every_built_in_row_is_named_in_the_documents():
    from fedhead.common.data.sources import SOURCES
    from fedhead.common.models.backbones import BACKBONES
    from fedhead.common.models.encoders import CUTS

    models = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    recipes = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert [name for name in CUTS if not re.search(rf"\b{name}\b", models)] == []
    assert [name for name in BACKBONES if f"`{name}:" not in models] == []
    assert [name for name in SOURCES if f"`{name}:" not in recipes] == []


def test_no_page_names_a_path_of_a_machine():
    for path in PAGES:
        assert not re.search(r"/(work|tmp|home|root)/", path.read_text(encoding="utf-8")), path


@pytest.mark.slow
@pytest.mark.parametrize(("page", "recipe"), [("own-data.md", "my-parts.toml"), ("models.md", "my_texts.toml")])
def test_code_of_the_users_own_runs(page: str, recipe: str, tmp_path: Path):
    for name, body in named_files(page).items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    load_recipe(tmp_path / recipe)
    command = [sys.executable, "-m", "fedhead", "simulate", recipe, "--json"]
    command += ["--set", "training.rounds=2", "--set", "run.baseline=false"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["rounds"]) == 2
    assert result["final"]["accuracy"] > 0
