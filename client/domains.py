"""Whose data a budget domain has ever held, as keyed hashes: what shows that a declaration of disjointness is false.

    STORAGE/domains/              0700
      key                         0600   32 random bytes; without them the files say nothing, and can't be compared
      DOMAIN.bin                  0600   a line of JSON, the hashes in order, and a keyed checksum of both
      lock                               held while a file is read, merged and written

Two domains of one holder are paid for apart only when their people are disjoint. What a domain has held only grows:
data that was deleted or edited has been trained on, and what it cost stays spent. Identities are persons where the
data names them (data.person), else the contents of records, whose order, labels and further columns don't matter.

These files never leave the holder. The key lies beside them, so that they protect a copy of a file, not of the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal

import numpy as np

from fedhead.common.data.persons import names_of
from fedhead.common.data.records import Records
from fedhead.common.errors import FedheadError
from fedhead.common.writing import write_aside

Kind = Literal["persons", "records"]
KINDS: Final[tuple[Kind, ...]] = ("persons", "records")
FOLDER: Final = "domains"
_SCHEMA: Final = 1
_SIZE: Final = 16  # bytes of a hash: two of a million identities agree by accident with probability 1e-26
_KEY_SIZE: Final = 32
_MAC_SIZE: Final = 32
_OWNER: Final = 0o600
_HASHES: Final = np.dtype(f"S{_SIZE}")


class DomainError(FedheadError):
    """What is kept of a domain can't be read, written or compared; names domains and files only."""


@dataclass(frozen=True)
class Identities:
    """Who or what a selection of records belongs to, not hashed yet.

    Attributes
    ----------
    kind : "persons" or "records"
    values : sequence of bytes
        One for each person, or for each record.
    """

    kind: Kind
    values: tuple[bytes, ...]


def identities(records: Records, person: str | None) -> Identities:
    """The persons of records, or their contents where no column names persons.

    Raises
    ------
    DataError
        The column isn't there, or a record has no value in it; see `names_of`.
    """
    if person is None:
        return Identities("records", tuple(row.tobytes() for row in records.digests()))
    names = np.unique(names_of(records, person, "data.person")).tolist()
    return Identities("persons", tuple(name.encode("utf-8", "surrogatepass") for name in names))


class Domains:
    """What the domains of a storage folder have ever held.

    Parameters
    ----------
    storage : Path
        The holder's storage folder; made, for its owner only, when something is remembered.
    """

    def __init__(self, storage: Path) -> None:
        self._folder = storage / FOLDER

    def seen(self, domain: str) -> bool:
        """Whether anything of a domain was ever remembered here."""
        return self._path(domain).exists()

    def remember(self, domain: str, found: Identities) -> None:
        """Add identities to what a domain has held; nothing is ever taken away.

        Durable when it returns: a crash leaves the old file or the whole new one. Processes wait for each other.

        Raises
        ------
        DomainError
            The folder can't be used, or what is kept is damaged: a damaged file is never replaced.
        """
        with _told(self._folder):
            _make(self._folder)
            with self._locked():
                key = self._key(create=True)
                held = self._read(domain, key) if self.seen(domain) else _nothing()
                hashes = _array(_hashed(value, found.kind, key) for value in found.values)
                merged = np.union1d(held[found.kind], hashes)
                if len(merged) > len(held[found.kind]) or not self.seen(domain):
                    self._write(domain, {**held, found.kind: merged}, key)

    def overlap(self, domain_a: str, domain_b: str) -> int:
        """How many persons (records) two domains have in common, over all that each has ever held.

        Returns
        -------
        int
            For the holder alone; 0 for disjoint domains.

        Raises
        ------
        DomainError
            One of them was never remembered, or is damaged, or one has persons where the other has records: then
            nothing shows that they are disjoint.
        """
        with _told(self._folder):
            for domain in (domain_a, domain_b):
                if not self.seen(domain):
                    raise DomainError(
                        f'domain "{domain}": nothing of it was seen here yet. Run "fedhead check" on its own file.'
                    )
            with self._locked():
                key = self._key(create=False)
                a, b = self._read(domain_a, key), self._read(domain_b, key)
        if [kind for kind in KINDS if len(a[kind])] != [kind for kind in KINDS if len(b[kind])]:
            raise DomainError(
                f'domains "{domain_a}" and "{domain_b}" can\'t be compared: one of them has held records without '
                "data.person. Leave the other out of budget.disjoint_from: they then add up."
            )
        return sum(len(np.intersect1d(a[kind], b[kind], assume_unique=True)) for kind in KINDS)

    def _path(self, domain: str) -> Path:
        return self._folder / f"{domain}.bin"

    def key(self) -> bytes:
        """The secret that hashes are keyed with; made where there is none.

        Raises
        ------
        DomainError
        """
        with _told(self._folder):
            _make(self._folder)
            with self._locked():
                return self._key(create=True)

    def _key(self, create: bool) -> bytes:
        path = self._folder / "key"
        if create and not path.exists():
            if any(self._folder.glob("*.bin")):
                raise DomainError(f"{path} is missing: the files beside it can't be read. Restore it from a backup.")
            write_aside(path, secrets.token_bytes(_KEY_SIZE), _OWNER, durable=True)
        key = path.read_bytes()
        if len(key) != _KEY_SIZE:
            raise DomainError(f"{path} is damaged: it must have {_KEY_SIZE} bytes. Restore it from a backup.")
        return key

    def _read(self, domain: str, key: bytes) -> dict[Kind, np.ndarray]:
        path = self._path(domain)
        content = path.read_bytes()
        body, mac = content[:-_MAC_SIZE], content[-_MAC_SIZE:]
        damaged = DomainError(
            f"{path} is damaged, or belongs to another key or domain. Restore the folder {FOLDER} from a backup."
        )
        if len(content) <= _MAC_SIZE or not hmac.compare_digest(mac, _mac(body, key)):
            raise damaged
        line, _, rest = body.partition(b"\n")
        header = json.loads(line)  # ours: the checksum holds
        if (header["schema"], header["domain"]) != (_SCHEMA, domain):
            raise damaged  # a file that was renamed, or a name that the file system does not tell from another
        values = np.frombuffer(rest, dtype=_HASHES)
        first = header["persons"]
        return {"persons": values[:first], "records": values[first:]}

    def _write(self, domain: str, held: Mapping[Kind, np.ndarray], key: bytes) -> None:
        header = {"schema": _SCHEMA, "domain": domain, "persons": len(held["persons"]), "records": len(held["records"])}
        body = json.dumps(header, sort_keys=True).encode() + b"\n" + b"".join(held[kind].tobytes() for kind in KINDS)
        write_aside(self._path(domain), body + _mac(body, key), _OWNER, durable=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _OWNER)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)  # gives the lock back


def _nothing() -> dict[Kind, np.ndarray]:
    return {"persons": _array(()), "records": _array(())}


def _hashed(value: bytes, kind: Kind, key: bytes) -> bytes:
    return blake2b(value, digest_size=_SIZE, key=key, person=kind.encode()).digest()


def _mac(body: bytes, key: bytes) -> bytes:
    return blake2b(body, digest_size=_MAC_SIZE, key=key, person=b"domain-file").digest()


def _array(hashes: Iterable[bytes]) -> np.ndarray:
    """Sorted, each once: (M,) of 16 bytes."""
    return np.unique(np.array(list(hashes), dtype=_HASHES))


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """A fault of the file system in one line."""
    try:
        yield
    except OSError as error:
        raise DomainError(
            f"{folder} can't be used ({error.strerror or type(error).__name__}). Check its permissions and the space "
            "left."
        ) from error


def _make(folder: Path) -> None:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
