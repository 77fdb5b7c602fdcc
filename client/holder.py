"""holder.toml: the data holder's own file. Nothing that arrives from a server can change what it says.

name                      who this is
server, ca, key           where it joins, and how the two know each other
metrics                   where its figures can be read, on this machine alone
[data]                    the records
[budget]                  what they may cost in all
[limits]                  what a request may ask for
[storage]                 where the ledger and everything else of this holder lies
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import Field

from fedhead.common.config.faults import fault, setting_name
from fedhead.common.config.files import SettingsFile, judged
from fedhead.common.config.limits import Budget, Limits
from fedhead.common.config.names import Name, is_name
from fedhead.common.config.places import HOST_RULE, address_of, is_host, path_from
from fedhead.common.config.tables import Table, read_bytes, read_toml
from fedhead.common.errors import InputError

LEDGER, FEATURES = "ledger.sqlite", "features"
MADE = "ledger.made"
"""Beside the ledger: says that there was one."""
ROLES = ("text", "image", "vector", "label")
_PATH = r"^[^\x00]+$"
_ADDRESS = r"^\S+:[0-9]{1,5}$"
_PAGE = "docs/holder.md"
_MISSING = f"Name the data holder's own file; {_PAGE} shows one."


class HolderData(Table):
    """The records of one data holder."""

    source: str = Field(
        pattern=r"^[a-z]+:[^\x00]+$",
        description="Where the records are, as a recipe's `data.source`, such as `parquet:records.parquet`.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Which column is the `text`, `image` or `vector`, and which the `label`. Default: the role's name.",
    )
    person: str | None = Field(
        None, min_length=1, description="The column that says whose record it is. Needed by the unit `person`."
    )
    labels: list[str] | None = Field(
        None,
        min_length=2,
        description="The labels that the records may have; needed to take part. A deployed holder trains only for "
        "recipes with just these labels, and for none where it is left out: a server could otherwise find out which "
        "labels occur. `fedhead check` finds records with another one.",
    )


class Storage(Table):
    """Where a holder keeps what is its own."""

    folder: str = Field(
        "state",
        pattern=_PATH,
        description="Folder of the ledger with the stored releases, the key that signs statements, the feature cache "
        "and keyed hashes of whom each domain has held.",
    )


class HolderFile(SettingsFile):
    """A whole holder.toml."""

    name: Name = Field(description="The holder's name, as the ledger writes it.")
    server: str | None = Field(
        None, pattern=_ADDRESS, description="Address of the coordinator, `fl.example.org:8443`. For `join`."
    )
    ca: str | None = Field(None, pattern=_PATH, description="Certificate that the coordinator is known by. For `join`.")
    key: str | None = Field(None, pattern=_PATH, description="This holder's private key. For `join`.")
    metrics: str | None = Field(
        None,
        pattern=_ADDRESS,
        description="Where monitoring on this machine reads figures of a holder that has joined, `127.0.0.1:9102`. "
        "Loopback only. Default: nowhere.",
    )
    data: HolderData = Field(description="The records.")
    budget: Budget = Field(description="What may be spent in all, over runs, restarts and changes of the data.")
    limits: Limits = Field(default_factory=Limits, description="What a request may ask for.")
    storage: Storage = Field(default_factory=Storage, description="Where this holder keeps what is its own.")

    @property
    def folder(self) -> Path:
        """The storage folder."""
        return self.path(self.storage.folder)

    @property
    def ledger(self) -> Path:
        """The ledger's file; it may not be there yet."""
        return self.folder / LEDGER

    @property
    def features(self) -> Path:
        """The folder of cached features; it may not be there yet."""
        return self.folder / FEATURES


@dataclass(frozen=True)
class _Parts:
    """The settings of a file; None for one that has faults of its own, or isn't given."""

    server: str | None = None
    ca: str | None = None
    key: str | None = None
    metrics: str | None = None
    data: HolderData | None = None
    budget: Budget | None = None
    limits: Limits | None = None


def load_holder(path: str | Path) -> HolderFile:
    """Read a holder.toml.

    Parameters
    ----------
    path : path
        A TOML file; relative paths inside it start from its folder.

    Raises
    ------
    ConfigError
        With every fault at once, one line each.
    """
    path = Path(path)
    return make_holder(read_toml(path, "HOLDER", _MISSING), base=path.parent)


def digest_of(path: Path) -> str:
    """Digest of a holder.toml as it lies there now, valid or not: another one says that the file was edited.

    Raises
    ------
    ConfigError
        It can't be read.
    """
    return blake2b(read_bytes(path, "HOLDER", _MISSING), digest_size=16).hexdigest()


def make_holder(raw: Mapping[str, Any], base: Path | None = None) -> HolderFile:
    """A holder's settings from a nested mapping.

    Parameters
    ----------
    raw : mapping
        The tables of the file.
    base : Path, optional
        Folder that relative paths start from; default: the current one.

    Raises
    ------
    ConfigError
        With every fault at once, one line each.
    """
    return judged(HolderFile, raw, base, _Parts, _RULES, _PAGE)


def _files(parts: _Parts, base: Path) -> Iterator[str]:
    for name in ("ca", "key"):
        text = getattr(parts, name)
        if text is not None and not os.path.isfile(path_from(text, base)):
            yield fault(
                name, text, "there is no such file", "Paths start at the file's folder; correct it, or leave it out."
            )


def _addresses(parts: _Parts, _: Path) -> Iterator[str]:
    for name, example in (("server", "fl.example.org:8443"), ("metrics", "127.0.0.1:9102")):
        text = getattr(parts, name)
        if text is None:
            continue
        if not 1 <= address_of(text)[1] <= 65_535:
            yield fault(name, text, "a port must be a number from 1 to 65535", f"Give one such as {example}.")
        elif name == "server" and not is_host(text):
            yield fault(name, text, HOST_RULE, f"Give one such as {example}.")
        elif name == "metrics":
            from fedhead.common.operations.metrics import loopback  # brings prometheus_client, which few files need

            try:
                loopback(text)
            except InputError as error:
                yield str(error)


def _data(parts: _Parts, _: Path) -> Iterator[str]:
    data = parts.data
    if data is None:
        return
    for role, column in data.columns.items():
        if role not in ROLES:
            yield fault(
                setting_name(("data", "columns", role), {}), column, f"a role must be one of {', '.join(ROLES)}",
                "Further columns need no role.",
            )  # fmt: skip
    inputs = [role for role in ROLES[:3] if role in data.columns]
    if len(inputs) > 1:
        yield fault("data.columns", data.columns, "a record must have one input", "Keep one of text, image, vector.")
    label = data.columns.get("label", "label")
    for role in inputs:
        if data.columns[role] == label:
            yield fault(
                f"data.columns.{role}", label, "it must be another column than the label's", "Name the input's column."
            )
    if data.person is not None and data.person in {label, *(data.columns[role] for role in inputs)}:
        yield fault(
            "data.person", data.person, "it must be a column of its own, not an input or label",
            "Name the column that says whose record it is.",
        )  # fmt: skip
    if data.labels is not None and len(set(data.labels)) < len(data.labels):
        twice = sorted({text for text in data.labels if data.labels.count(text) > 1})
        yield fault("data.labels", twice, "a label must be listed once", "Remove the repetition.")


def _budget(parts: _Parts, _: Path) -> Iterator[str]:
    budget = parts.budget
    if budget is None:
        return
    run = budget.per_run
    for name in ("epsilon", "delta"):
        value, most = None if run is None else getattr(run, name), getattr(budget, name)
        if value is not None and value > most:
            yield fault(f"budget.per_run.{name}", value, f"it must be at most budget.{name}, {most:g}", "Lower it.")
    others = budget.disjoint_from
    for index, other in enumerate(others):
        if not is_name(other):
            yield fault(
                f"budget.disjoint_from[{index}]", other, "it must be the name of a domain",
                "Name a budget.domain of this holder.",
            )  # fmt: skip
    if budget.domain.endswith(".holder-unit"):
        yield fault(
            "budget.domain", budget.domain, "this ending is for runs under the unit holder", "Give another name."
        )
    if budget.domain in others:
        yield fault(
            "budget.disjoint_from", others, "a domain can't be disjoint from itself", f'Remove "{budget.domain}".'
        )
    if len(set(others)) < len(others):
        yield fault("budget.disjoint_from", others, "a domain must be listed once", "Remove the repetition.")
    if parts.limits is not None and parts.limits.release.metrics and budget.poisson_share == 1:
        yield fault(
            "budget.poisson_share", budget.poisson_share,
            "it must be less than 1 when limits.release.metrics is true, because counts are not paid from that share",
            "Lower it, or set limits.release.metrics = false.",
        )  # fmt: skip


def _limits(parts: _Parts, _: Path) -> Iterator[str]:
    limits = parts.limits
    if limits is None:
        return
    for name in ("tasks", "backbones"):
        if getattr(limits, name) == []:
            yield fault(
                f"limits.{name}", [], "with an empty list every request is refused", "Name some, or leave it out."
            )
    if "holder" in limits.units and len(limits.units) > 1:
        yield fault(
            "limits.units", limits.units, 'the unit holder must stand alone: it trusts the server with updates without '
            "noise, and the figures of the other units would mean nothing to that server",
            "Name either holder, or others.",
        )  # fmt: skip
    if limits.units == ["person"] and parts.data is not None and parts.data.person is None:
        yield fault(
            "limits.units", limits.units, "the unit person needs data.person",
            "Set data.person to the column that says whose record it is.",
        )  # fmt: skip


_RULES: tuple[Callable[[_Parts, Path], Iterator[str]], ...] = (_files, _addresses, _data, _budget, _limits)
