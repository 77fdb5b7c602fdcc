"""Whether the Flower that is installed is the one whose inner parts join relies on; imports nothing of it."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Final

from fedhead.common.errors import RunError

SERIES: Final = "1.41"


def check_flower() -> None:
    """Refuse another series of Flower than the one that flower.py, tasks.py, uploading.py and weighing.py are made for.

    Raises
    ------
    RunError
        One line.
    """
    found = importlib.metadata.version("flwr")
    if ".".join(found.split(".")[:2]) != SERIES:
        raise RunError(
            f"flwr {found} is installed: to join takes {SERIES}, because inner parts of it are replaced. "
            f'Run: pip install "flwr>={SERIES},<1.42"'
        )


def environment(folder: Path) -> dict[str, str]:
    """What the environment must say before Flower and models are imported: nothing calls home, nothing lies elsewhere.

    A recipe that arrives can name a model of the hub: it is taken from the holder's cache, and not downloaded because
    a server says so, unless the holder itself has set HF_HUB_OFFLINE=0.

    Parameters
    ----------
    folder : Path
        The holder's storage folder; `flower` inside it is Flower's own, closed to others.
    """
    home = folder / "flower"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.chmod(0o700)
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }
