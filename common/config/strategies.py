"""Settings of the aggregation strategies; what carries them out is in fedhead.server.strategies.

Weights are the declared record counts (the default) or uniform, never a true count.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from fedhead.common.config.tables import Table, by_kind


class _Base(Table):
    weights: Literal["declared", "uniform"] = Field(
        "declared",
        description="Weight of a holder's update: its declared record count, or the same for all. Under the unit "
        "`holder` always the same.",
    )


class FedAvg(_Base):
    """Weighted mean of the updates (McMahan et al. 2017, arXiv:1602.05629)."""

    kind: Literal["fedavg"] = Field(description="Weighted mean.")


class FedAvgM(_Base):
    """Weighted mean with momentum at the server (Hsu et al. 2019, arXiv:1909.06335)."""

    kind: Literal["fedavgm"] = Field("fedavgm", description="Weighted mean with momentum at the server.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Share of the last server step that is kept.")
    learning_rate: float = Field(1.0, gt=0, description="Scales the server's step.")


class _Adaptive(_Base):
    learning_rate: float = Field(0.1, gt=0, description="The server's step size.")
    tau: float = Field(1e-3, gt=0, description="Degree of adaptivity: added to the denominator.")


class FedAdagrad(_Adaptive):
    """Adagrad at the server (Reddi et al. 2021, arXiv:2003.00295)."""

    kind: Literal["fedadagrad"] = Field(description="Adagrad at the server.")


class FedAdam(_Adaptive):
    """Adam at the server (Reddi et al. 2021, arXiv:2003.00295)."""

    kind: Literal["fedadam"] = Field(description="Adam at the server.")
    beta_1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta_2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment.")


class FedYogi(_Adaptive):
    """Yogi at the server (Reddi et al. 2021, arXiv:2003.00295)."""

    kind: Literal["fedyogi"] = Field(description="Yogi at the server.")
    beta_1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta_2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment.")


class FedProx(_Base):
    """Weighted mean, with a pull to the received head in local steps (Li et al. 2020, arXiv:1812.06127)."""

    kind: Literal["fedprox"] = Field(description="Weighted mean, with a pull to the received head.")
    proximal_mu: float = Field(0.01, ge=0, description="Strength of the pull, added after clipping and noise.")


class FedMedian(_Base):
    """Coordinate-wise median (Yin et al. 2018, arXiv:1803.01498)."""

    kind: Literal["median"] = Field(description="Coordinate-wise median.")


class FedTrimmedAvg(_Base):
    """Coordinate-wise trimmed mean (Yin et al. 2018, arXiv:1803.01498)."""

    kind: Literal["trimmed-mean"] = Field(description="Coordinate-wise mean without the extremes.")
    beta: float = Field(0.2, ge=0, lt=0.5, description="Share cut off at each end.")


class Krum(_Base):
    """The update closest to its neighbours (Blanchard et al. 2017, arXiv:1703.02757)."""

    kind: Literal["krum"] = Field(description="The update closest to its neighbours.")
    malicious: int = Field(0, ge=0, description="How many holders may be malicious.")


Strategy = Annotated[
    Annotated[FedAvg, Tag("fedavg")]
    | Annotated[FedAvgM, Tag("fedavgm")]
    | Annotated[FedAdagrad, Tag("fedadagrad")]
    | Annotated[FedAdam, Tag("fedadam")]
    | Annotated[FedYogi, Tag("fedyogi")]
    | Annotated[FedProx, Tag("fedprox")]
    | Annotated[FedMedian, Tag("median")]
    | Annotated[FedTrimmedAvg, Tag("trimmed-mean")]
    | Annotated[Krum, Tag("krum")],
    by_kind("fedavgm"),
]
