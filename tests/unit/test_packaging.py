"""The layout: mapped folders, one top-level name, a listed package for every folder, a wheel that holds them all."""

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
