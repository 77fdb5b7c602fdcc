"""What all commands share: common options, and one way to print."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from fedhead.common.errors import Terminated

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; KEY= takes it out.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def emit(found: Any, as_json: bool, show: Any) -> None:
    """Print a result: as one JSON object, or by calling `show`."""
    try:
        if as_json:
            typer.echo(json.dumps(found))
        else:
            show()
        sys.stdout.flush()
    except Terminated:
        raise
    except (BrokenPipeError, SystemExit):
        # The reader of a pipe went away (`| head`): nothing is wrong, though rich and typer would make it status 1.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
