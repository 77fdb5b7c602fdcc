"""What all commands share: common options, paths as people type them, and one way to print."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from fedhead.common.errors import Terminated

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; KEY= takes it out.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class HomePath(click.Path):
    """A path where `~` is the user's home: a shell leaves it as typed in `--out=~/x`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path as click would give it, from the user's home where it starts there."""
        from fedhead.common.config.places import path_from

        return super().convert(str(path_from(str(value), Path())), param, ctx)


class Commands(TyperGroup):
    """Commands all of whose paths are `HomePath`s."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in self.commands.values():
            for parameter in command.params:
                if isinstance(parameter.type, click.Path):
                    parameter.type = HomePath()


def emit(found: Any, as_json: bool, show: Any) -> None:
    """Print a result: as one JSON object, or by calling `show`."""
    try:
        if as_json:
            from fedhead.common.results import finite

            typer.echo(json.dumps(finite(found), allow_nan=False))
        else:
            show()
        sys.stdout.flush()
    except Terminated:
        raise
    except (BrokenPipeError, SystemExit):
        # The reader of a pipe went away (`| head`): nothing is wrong, though rich and typer would make it status 1.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
