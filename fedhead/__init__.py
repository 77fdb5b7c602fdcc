"""Fine-tune the head of a pre-trained model across data holders, under differential privacy that is counted right.

    import fedhead

    result = fedhead.simulate("quickstart")     # or a recipe's path, or a RunConfig
    model = fedhead.load(result.folder / "model")
    labels, probabilities = model.predict(["what a lovely day"])

Importing this package imports neither torch nor Flower; each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedhead.common.config import RunConfig as RunConfig
    from fedhead.common.config import find_recipe as find_recipe
    from fedhead.common.config import make_config as make_config
    from fedhead.common.models.saved import load_model as load
    from fedhead.common.results import Result as Result
    from fedhead.simulations.audit.ledgers import audit_ledgers as audit_ledgers
    from fedhead.simulations.audit.mechanism import audit_mechanism as audit_mechanism
    from fedhead.simulations.audit.membership import audit_membership as audit_membership
    from fedhead.simulations.plans import of_recipe as plan
    from fedhead.simulations.simulate import simulate as simulate

__version__ = "0.1.0"
__all__ = [
    "Result",
    "RunConfig",
    "__version__",
    "audit_ledgers",
    "audit_mechanism",
    "audit_membership",
    "find_recipe",
    "load",
    "make_config",
    "plan",
    "simulate",
]

# Flower's and the hub's libraries call home and print banners unless told otherwise before they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_LAZY = {
    "RunConfig": ("fedhead.common.config", "RunConfig"),
    "Result": ("fedhead.common.results", "Result"),
    "find_recipe": ("fedhead.common.config", "find_recipe"),
    "make_config": ("fedhead.common.config", "make_config"),
    "load": ("fedhead.common.models.saved", "load_model"),
    "audit_ledgers": ("fedhead.simulations.audit.ledgers", "audit_ledgers"),
    "audit_mechanism": ("fedhead.simulations.audit.mechanism", "audit_mechanism"),
    "audit_membership": ("fedhead.simulations.audit.membership", "audit_membership"),
    "plan": ("fedhead.simulations.plans", "of_recipe"),
    "simulate": ("fedhead.simulations.simulate", "simulate"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fedhead' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
