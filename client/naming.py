"""What a holder's file names that must be there, or known: code, kinds of task, and a port of this machine."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import Final

from fedhead.client.findings import Finding, State, apart
from fedhead.client.holder import HolderFile
from fedhead.client.joining.join import has_joined
from fedhead.common.config.schema import TASKS
from fedhead.common.errors import InputError

_MODULE: Final = "module:"
_CODE: Final = re.compile(r"[^\W\d]\w*(\.\w+)*:\w+")  # as limits.modules has it: package.module:name


def named_code(holder: HolderFile, *, joining: bool) -> Iterator[Finding]:
    """Entries of limits.modules that no recipe could use. Packages are looked for; none of their code is run.

    Nobody is kept from joining by them: other recipes may need none.
    """
    state: State = "warning" if joining else "remedy"
    for entry in holder.limits.modules:
        shown = f'limits.modules has "{entry}"'
        if _CODE.fullmatch(entry) is None:
            bare = entry.removeprefix(_MODULE)
            meant = _CODE.fullmatch(bare) is not None
            remedy = f'Write "{bare}".' if meant else "Give one such as torch.nn:Identity."
            yield Finding("code", state, f"{shown}: it must have the form package.module:name", remedy)
            continue
        package = re.split("[.:]", entry)[0]
        if not _is_here(package):
            yield Finding(
                "code", state, f'{shown}: there is no package "{package}" here',
                "Install it where `fedhead join` runs, or correct the name.",
            )  # fmt: skip


def _is_here(package: str) -> bool:
    """Whether a package could be imported; the name has no dot, so that finding it imports nothing."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # one that is imported already, and doesn't say from where
        return True


def named_tasks(holder: HolderFile, *, joining: bool) -> Iterator[Finding]:
    """Entries of limits.tasks that no recipe could have here; nobody is kept from joining by them."""
    state: State = "warning" if joining else "remedy"
    for entry in holder.limits.tasks or ():
        code = entry.removeprefix(_MODULE)
        if entry in TASKS or (code != entry and code in holder.limits.modules):
            continue
        shown = f'limits.tasks has "{entry}"'
        if code != entry and _CODE.fullmatch(code) is not None:
            remedy = f'Add "{code}" there, or remove it.'
            yield Finding("task", state, f"{shown}: limits.modules lacks it", remedy)
        else:
            yield Finding(
                "task", state, f"{shown}: there is no such kind of task",
                f"Write {' or '.join(TASKS)}, or module:package.module:name for code that limits.modules names.",
            )  # fmt: skip


def port(holder: HolderFile, *, joining: bool) -> Iterator[Finding]:
    """Whether figures could be served: where this holder has joined already, it is its own that are.

    Parameters
    ----------
    joining : bool
        Whether it is this process that joins.
    """
    if holder.metrics is None:
        return
    from fedhead.common.operations.metrics import check_free

    try:
        check_free(holder.metrics)
    except InputError as error:
        if not joining and has_joined(holder):
            yield Finding("metrics", "ok", f"{holder.metrics}: this holder has joined, and listens there")
        else:
            yield Finding("metrics", "remedy", *apart(error))
    else:
        yield Finding("metrics", "ok", f"{holder.metrics} is free")
