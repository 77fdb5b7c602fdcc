"""Objects named in a recipe as `module:package.module:name`.

Only recipes and files on this machine may name code. Nothing that arrives over the network is ever resolved here.
"""

from __future__ import annotations

import importlib
from typing import Any

from fedhead.common.errors import ConfigError, Terminated


def load_reference(reference: str, setting: str) -> Any:
    """The object behind `module:package.module:name`.

    Parameters
    ----------
    reference : str
        As typed in the recipe.
    setting : str
        The setting's name, for the error.

    Raises
    ------
    ConfigError
        When the module can't be imported or has no such name.
    """
    parts = reference.split(":")
    if len(parts) != 3 or parts[0] != "module" or not all(parts) or parts[1].startswith("."):
        raise ConfigError(
            [f'{setting} is "{reference}": it must have the form "module:package.module:name". Give all three parts.']
        )
    try:
        module = importlib.import_module(parts[1])
    except ImportError as error:
        raise ConfigError(
            [f'{setting} is "{reference}": the module can\'t be imported ({error}). Install it, or set PYTHONPATH.']
        ) from error
    except Terminated:
        raise
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise ConfigError(
            [
                f'{setting} is "{reference}": the module raised {type(error).__name__} when it was imported. '
                "Correct it; FEDHEAD_DEBUG=1 shows the details."
            ]
        ) from error
    if not hasattr(module, parts[2]):
        raise ConfigError([f'{setting} is "{reference}": {parts[1]} has no "{parts[2]}". Check the name\'s spelling.'])
    return getattr(module, parts[2])
