"""The layout: mapped folders, one top-level name, a listed package for every folder, a wheel that holds them all."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = ("server", "client", "common", "simulations")


def folders() -> set[str]:
    found = {"fedhead"}
    for top in MAPPED:
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join(["fedhead", *init.parent.relative_to(ROOT).parts]))
    return found


def test_every_folder_is_a_listed_package():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders()


def test_every_folder_of_code_has_an_init():
    for top in MAPPED:
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_links_lead_to_the_folders():
    for top in MAPPED:
        link = ROOT / "fedhead" / top
        assert link.is_symlink()
        assert link.resolve() == ROOT / top


@pytest.mark.slow
def test_wheel_holds_one_top_level_name_and_all_files(tmp_path: Path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fedhead"}
    for folder in MAPPED:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".csv", ".html") and "__pycache__" not in path.parts:
                assert f"fedhead/{path.relative_to(ROOT)}" in names, path
    assert "fedhead/py.typed" in names


def modules(*words: str) -> dict[Path, str]:
    """All modules of the project that have one of these words: path -> text."""
    paths = [*(ROOT / "fedhead").glob("*.py"), *(path for top in MAPPED for path in (ROOT / top).rglob("*.py"))]
    assert len(paths) > 200
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}
    return {path: text for path, text in texts.items() if any(word in text for word in words)}


def private_engines(code: str) -> list[int]:
    """Lines that hand a model to Opacus's engine: it divides by the true count, and replaces loader and optimizer."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if (isinstance(node, ast.Attribute) and (node.attr == "PrivacyEngine" or node.attr.startswith("make_private")))
        or (isinstance(node, ast.Name) and node.id == "PrivacyEngine")
        or (isinstance(node, ast.alias) and node.name.endswith("PrivacyEngine"))
    ]


def test_opacus_is_never_used_through_make_private():
    assert private_engines("import opacus\nopacus.PrivacyEngine().make_private_with_epsilon(1)") == [2, 2]
    assert private_engines("from opacus import PrivacyEngine as E\n") == [1]
    for path, code in modules("make_private", "PrivacyEngine").items():
        assert private_engines(code) == [], path


def test_no_console_reads_markup_in_what_people_typed():
    """Of `[/x]` in a name rich makes an error, and of `[lr=3]` in a path nothing at all."""
    seen = 0
    for path, code in modules("Console(", "TextColumn(").items():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Console", "TextColumn"):
                given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                assert given.get("markup") is False, f"{path}:{node.lineno}"
                seen += 1
    assert seen > 10


def test_help_does_not_import_torch():
    code = (
        "import sys, fedhead.cli as c; c.app(['--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'flwr', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")


def test_version_is_the_project_s():
    import fedhead

    assert fedhead.__version__ == PROJECT["project"]["version"]


def test_exported_names():
    import fedhead

    assert sorted(fedhead.__all__) == [
        "Result",
        "RunConfig",
        "__version__",
        "audit_ledgers",
        "audit_mechanism",
        "audit_membership",
        "find_recipe",
        "load",
        "make_config",
        "plan",
        "simulate",
    ]
    for name in fedhead.__all__:
        assert getattr(fedhead, name) is not None


def test_flower_finds_both_apps():
    apps = PROJECT["tool"]["flwr"]["app"]["components"]
    assert apps == {"serverapp": "fedhead.server.app:app", "clientapp": "fedhead.client.app:app"}
