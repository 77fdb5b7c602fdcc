"""What has to be settled before Flower is imported, and whether it is the Flower that this package knows."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from fedhead.common.errors import InputError

FLOWER: Final = "1.41."


def set_environment(home: Path) -> None:
    """Keep Flower's files in a folder of ours, and let it call nobody.

    Parameters
    ----------
    home : Path
        Made with mode 0700 where there is none.
    """
    home.mkdir(mode=0o700, exist_ok=True)
    os.environ |= {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    for name in ("FLWR_INTERNAL_GRPC_FLEET_API", "FLWR_INTERNAL_GRPC_CONTROL_API"):
        os.environ.pop(name, None)  # each would open a further port, without any of our checks


def check_flower() -> None:
    """Refuse another version of Flower: what is used of it is known for this one alone.

    Raises
    ------
    InputError
        In one line.
    """
    try:
        found = version("flwr")
    except PackageNotFoundError:
        found = "none"
    if not found.startswith(FLOWER):
        raise InputError(
            f'flwr is version {found}: the server is built on {FLOWER}x. Run: pip install "flwr=={FLOWER}*"'
        )


def import_flower() -> None:
    """Import what is used of Flower, after `set_environment`.

    Raises
    ------
    InputError
        Something of it has another name now; one line.
    """
    try:
        for name in ("flower", "nodes"):
            importlib.import_module(f"fedhead.server.link.{name}")
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"flwr is version {version('flwr')}: a part that the server needs is not there ({error}). Install a 1.41 "
            "that fedhead was tested with."
        ) from error
