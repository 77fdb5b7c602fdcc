"""The recipe of a run: one schema, every fault reported at once.

schema.py and strategies.py say what may be set, checks.py what goes together, faults.py how a fault reads, files.py how
any file of settings is judged, load.py reads TOML and overrides, reference.py writes docs/recipes.md.
"""

from fedhead.common.config.load import (
    builtin_recipes,
    changed,
    find_recipe,
    from_json,
    load_recipe,
    make_config,
    to_json,
)
from fedhead.common.config.schema import RunConfig

__all__ = [
    "RunConfig",
    "builtin_recipes",
    "changed",
    "find_recipe",
    "from_json",
    "load_recipe",
    "make_config",
    "to_json",
]
