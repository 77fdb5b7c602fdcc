"""The aggregation strategies: Flower's own, each behind its settings.

A new strategy is a table of settings in fedhead.common.config.strategies and a row in `STRATEGIES`. Cohorts, the order
of replies and the checks on them are not the strategy's business: rounds.py puts them around whichever is chosen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.serverapp.strategy import FedAvg

from fedhead.common.config.strategies import Strategy


@dataclass(frozen=True)
class StrategyKind:
    """A row of the table.

    Attributes
    ----------
    summary : str
    name : str
        Class in flwr.serverapp.strategy.
    options : callable
        Settings -> keyword arguments of the class.
    """

    summary: str
    name: str
    options: Callable[[Any], dict[str, Any]]

    def load(self) -> type[FedAvg]:
        """Flower's class, imported when it is used."""
        found: type[FedAvg] = getattr(importlib.import_module("flwr.serverapp.strategy"), self.name)
        return found


def _none(_: Any) -> dict[str, Any]:
    return {}


def _adaptive(s: Any) -> dict[str, Any]:
    return {"eta": s.learning_rate, "tau": s.tau}


def _moments(s: Any) -> dict[str, Any]:
    return {**_adaptive(s), "beta_1": s.beta_1, "beta_2": s.beta_2}


STRATEGIES: Mapping[str, StrategyKind] = {
    "fedavg": StrategyKind("weighted mean", "FedAvg", _none),
    "fedavgm": StrategyKind(
        "weighted mean with server momentum",
        "FedAvgM",
        lambda s: {"server_learning_rate": s.learning_rate, "server_momentum": s.momentum},
    ),
    "fedadagrad": StrategyKind("Adagrad at the server", "FedAdagrad", _adaptive),
    "fedadam": StrategyKind("Adam at the server", "FedAdam", _moments),
    "fedyogi": StrategyKind("Yogi at the server", "FedYogi", _moments),
    "fedprox": StrategyKind(
        "weighted mean, pull to the received head", "FedProx", lambda s: {"proximal_mu": s.proximal_mu}
    ),
    "median": StrategyKind("coordinate-wise median", "FedMedian", _none),
    "trimmed-mean": StrategyKind("mean without the extremes", "FedTrimmedAvg", lambda s: {"beta": s.beta}),
    "krum": StrategyKind("closest to its neighbours", "Krum", lambda s: {"num_malicious_nodes": s.malicious}),
}


def strategy_class(settings: Strategy) -> tuple[type[FedAvg], dict[str, Any]]:
    """Flower's class and its keyword arguments for a recipe's strategy."""
    kind = STRATEGIES[settings.kind]
    return kind.load(), kind.options(settings)
