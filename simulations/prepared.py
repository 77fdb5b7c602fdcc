"""What a simulation needs before the first round and keeps from run to run: records, features, backbone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedhead.common.config import RunConfig
from fedhead.common.errors import DataError
from fedhead.common.models.backbones import Backbone
from fedhead.common.preparation import Labelled, Split, featurize, import_readers, load_backbone_for, read_split


@dataclass(frozen=True)
class Prepared:
    """Everything of a simulation that doesn't change from run to run: records, features, backbone."""

    config: RunConfig
    split: Split
    backbone: Backbone
    train: Labelled
    test: Labelled
    timing: Mapping[str, float]


def prepare(config: RunConfig, cache: Path | None) -> Prepared:
    """Read records, load the backbone, compute or open features."""
    import_seconds = import_readers(config)
    started = time.perf_counter()
    split = read_split(config)
    backbone, load_seconds = load_backbone_for(config, split.train)
    train = featurize(config, backbone, split.train, cache, "training features")
    test = featurize(config, backbone, split.test, cache, "test features")
    check_usable(train, "training", config)
    check_usable(test, "test", config)
    features_seconds = time.perf_counter() - started - load_seconds
    timing = {"load_seconds": import_seconds + load_seconds, "features_seconds": features_seconds}
    return Prepared(config, split, backbone, train, test, timing)


def check_usable(records: Labelled, which: str, config: RunConfig) -> None:
    """Refuse records of which none has finite features: nothing could be learned from them, or said about the head.

    Raises
    ------
    DataError
    """
    if not bool(records.features.finite().any()):
        raise DataError(
            f'model.backbone is "{config.model.backbone}": none of the {len(records)} {which} records has finite '
            "features. Check the records for missing values, and the backbone's weights."
        )
