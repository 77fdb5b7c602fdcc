"""The exception tree, and what each means for the exit status of a command.

    FedheadError                    1
    ├── InputError                  2   what the user gave is wrong; the message says setting, value, rule, remedy
    │   ├── ConfigError             2   a recipe; carries every fault at once
    │   ├── DataError               2   records, columns, labels, files
    │   └── ModelError              2   backbone, weights, digest
    ├── RunError                    1   a run that could not go on
    ├── LedgerError                 1   a ledger that can't be used (common/privacy/ledger/chain.py)
    ├── DomainError                 1   what is kept of a budget domain can't be used (client/domains.py)
    └── Refused                     1   a data holder's refusal: a fixed code and text, never an exception's own
    Terminated (a SystemExit)     143   SIGTERM

No record, label, norm or loss of a record may appear in any message.
"""

from __future__ import annotations

from collections.abc import Sequence


class FedheadError(Exception):
    """Base of every error that a user can meet; its text is the whole message."""

    exit_status = 1


class InputError(FedheadError):
    """What the user gave is wrong: one line a fault, with the setting, the value, the rule and the remedy."""

    exit_status = 2


class ConfigError(InputError):
    """A recipe that can't be run.

    Parameters
    ----------
    faults : sequence of str
        Every fault found, one line each.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class DataError(InputError):
    """Records, columns, labels or files that can't be used; never shows a record's content."""


class ModelError(InputError):
    """A backbone, weights or digest that can't be used."""


class RunError(FedheadError):
    """A run that could not go on."""


class Refused(FedheadError):
    """A data holder refuses a request.

    Parameters
    ----------
    code : int
        One of the fixed codes of ``fedhead.common.refusals``; only the code and its fixed text leave the holder.
    """

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


class Terminated(SystemExit):
    """SIGTERM came to a command; raised by its handler, so that a run cleans up behind itself.

    Where a SystemExit is caught that a library or code of the user's own may raise, this one is passed on.
    """
