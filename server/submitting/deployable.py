"""Whether a recipe can be run at data holders who are elsewhere, decided before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator

from fedhead.common.config import RunConfig, changed
from fedhead.common.config.faults import fault
from fedhead.common.errors import ConfigError
from fedhead.server.server_file import ServerFile


def deployable(config: RunConfig, server: ServerFile) -> RunConfig:
    """The recipe as a deployment runs it: for the holders that are registered, and without a comparison.

    Parameters
    ----------
    config : RunConfig
        As it was read; what it leaves out is told from what it sets to the default.
    server : ServerFile

    Returns
    -------
    RunConfig
        With `holders.count` holders, as many as have a key in server.toml, and `run.baseline` off.

    Raises
    ------
    ConfigError
        It asks for what only a simulation can do, or for what every holder would refuse; all faults at once.
    """
    faults = [*_simulated(config), *_refused(config), *_holders(config, server)]
    if faults:
        raise ConfigError(faults)
    return changed(config, {"holders.count": len(server.holders), "run.baseline": False})


def _simulated(config: RunConfig) -> Iterator[str]:
    """What only a simulation can do."""
    test = config.data.test
    if test.source is None:
        yield fault(
            "data.test.fraction", test.fraction,
            "a share of the holders' records can be held out in a simulation only: they don't leave the holders",
            'Name public test records: data.test = { source = "csv:test.csv" }.',
        )  # fmt: skip
    if "run" in config.model_fields_set and "baseline" in config.run.model_fields_set and config.run.baseline:
        yield fault(
            "run.baseline", True, "a comparison without privacy is for a simulation: no holder trains without noise",
            "Remove it, or set it to false.",
        )  # fmt: skip
    if config.data.declared_records is None:
        yield (
            "data.declared_records is missing: a deployment needs a public constant a holder, because the true number "
            "of records is a release. Agree on one, such as 1000."
        )


def _refused(config: RunConfig) -> Iterator[str]:
    """What every holder refuses, whatever its file says."""
    model = config.model
    if config.privacy.mechanism == "none":
        yield fault(
            "privacy.mechanism", "none", "a data holder has a budget, and refuses to train without noise",
            "Use full-batch or poisson.",
        )  # fmt: skip
    if model.weights is not None and not model.weights.startswith("pkg://"):
        yield fault(
            "model.weights", model.weights, "a file on the holders' machines is not for a server to name",
            "Name a package (pkg://PACKAGE/FILE), or leave it out for the model's hub.",
        )  # fmt: skip
    family, _, name = model.backbone.partition(":")
    if family == "transformers" and name.startswith((".", "/", "~")):
        yield fault(
            "model.backbone", model.backbone, "a folder on the holders' machines is not for a server to name",
            "Name the hub's, with model.weights from a package where holders are offline.",
        )  # fmt: skip


def _holders(config: RunConfig, server: ServerFile) -> Iterator[str]:
    """What doesn't fit with the holders that are registered."""
    known, holders = len(server.holders), config.holders
    given = "holders" in config.model_fields_set and "count" in holders.model_fields_set
    if given and holders.count != known:
        yield fault(
            "holders.count", holders.count, f"server.toml has the keys of {known} holders",
            "Leave it out: all that are registered take part.",
        )  # fmt: skip
    if holders.per_round is not None and holders.per_round < server.least_holders:
        yield fault(
            "holders.per_round", holders.per_round,
            f"it must be at least least_holders of server.toml, {server.least_holders}", "Raise it, or leave it out.",
        )  # fmt: skip
