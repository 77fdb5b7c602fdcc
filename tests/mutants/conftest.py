"""A recipe of persons for the audits of planted bugs, and of none."""

import numpy as np
import pytest

from fedhead.common.config import make_config


@pytest.fixture
def persons(tmp_path):
    """A recipe of persons with several records."""
    rng = np.random.default_rng(3)
    lines = ["label,who," + ",".join(f"x{i}" for i in range(16))]
    for row in range(300):
        lines.append(f"{row % 2},p{row % 70}," + ",".join(f"{value:.4f}" for value in rng.standard_normal(16)))
    (tmp_path / "people.csv").write_text("\n".join(lines))
    raw = {
        "task": {"labels": ["0", "1"]},
        "model": {"backbone": "module:torch.nn:Identity"},
        "data": {"source": "csv:people.csv", "columns": {"vector": "x*"}, "declared_records": 40},
        "holders": {"count": 2},
        "privacy": {"epsilon": 5.0, "unit": "person", "person": "who", "records_per_person": 4},
        "training": {"rounds": 10},
    }
    return lambda changes: make_config(
        {**raw, **{key: {**raw.get(key, {}), **value} for key, value in changes.items()}}, base=tmp_path
    )
