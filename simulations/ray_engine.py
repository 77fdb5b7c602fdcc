"""The same two apps on Flower's own simulation engine, which spreads holders over Ray workers.

Each worker opens the features from the cache that the driver has filled, so nothing is computed twice. The apps are
the module-level ones; only the run config is put in here, because `run_simulation` has no argument for it.
"""

from __future__ import annotations

import contextvars
import copy
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedhead.common.errors import InputError
from fedhead.simulations.logs import holders_log


class ConfiguredClient:
    """The client app with a run config; travels to the workers, which import the app themselves."""

    def __init__(self, run_config: Mapping[str, Any]) -> None:
        self.run_config = dict(run_config)

    def __call__(self, message: Message, context: Context) -> Message:
        """Handle a message as `fedhead.client.app.app` does."""
        from fedhead.client.app import app

        # Ray sends a worker's stderr to the terminal, where a holder's log must not go.
        with holders_log(Path(self.run_config["out"])):
            # Flower refuses a context whose run config was changed: the app gets one of its own, with the same state.
            return app(message, _with(context, self.run_config))


class ConfiguredServer:
    """The server app with a run config; runs in a thread of the driver, where the listener to progress is kept."""

    def __init__(self, app: Callable[[Grid, Context], None], run_config: Mapping[str, Any]) -> None:
        self.app, self.run_config = app, dict(run_config)
        self.context = contextvars.copy_context()

    def __call__(self, grid: Grid, context: Context) -> None:
        """Run as `fedhead.server.app.app` does."""
        self.context.run(self.app, grid, _with(context, self.run_config))


def _with(context: Context, run_config: Mapping[str, Any]) -> Context:
    own = copy.copy(context)
    own.run_config = {**context.run_config, **run_config}
    return own


def run_on_ray(server: ServerApp, holders: int, run_config: Mapping[str, Any]) -> None:
    """Run both apps to the end on Flower's simulation engine.

    Parameters
    ----------
    server : ServerApp
    holders : int
        Number of nodes.
    run_config : mapping
        As a user of Flower would give it.

    Raises
    ------
    InputError
        When Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            '--engine is "ray": Ray is not installed. Run pip install "fedhead[simulation]", or leave --engine out.'
        )
    from flwr.simulation import run_simulation

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=cast(ServerApp, ConfiguredServer(server, run_config)),
            client_app=cast(ClientApp, ConfiguredClient({**run_config, "out": str(Path(run_config["out"]).resolve())})),
            num_supernodes=holders,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
