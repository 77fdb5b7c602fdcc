"""How many sets of features a joined holder keeps.

Each backbone, length of a text or size of an image that a recipe names has features of its own. A server that names
one recipe after the other must not fill the disk that the ledger needs.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

MOST_SETS: Final = 4


def keep_newest(folder: Path, key: str) -> None:
    """Remove the sets that were not used for longest, so that at most `MOST_SETS` are there with the one that is next.

    Parameters
    ----------
    folder : Path
        Of the feature cache; it need not be there.
    key : str
        Name of the set that is used next; it need not be there. It counts as the newest from now on.
    """
    with suppress(OSError):  # not there yet
        os.utime(folder / key)
    others: list[tuple[float, Path]] = []
    for entry in folder.glob("[!.]*/"):
        with suppress(OSError):  # gone in between
            if entry.name != key:
                others.append((entry.stat().st_mtime, entry))
    for _, old in sorted(others, reverse=True)[MOST_SETS - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
        (folder / f"{old.name}.lock").unlink(missing_ok=True)
