"""Classification: losses of one record each, and metrics that agree with scikit-learn's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fedhead.common.config.schema import TaskSettings
from fedhead.common.errors import ConfigError
from fedhead.common.tasks import TASKS, make_task
from fedhead.common.tasks.classification import auc_roc


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_losses_are_one_a_record_and_depend_on_it_alone(kind):
    task = make_task(TaskSettings(kind=kind, labels=["a", "b", "c"]))
    outputs, targets = torch.randn(7, task.outputs), torch.arange(7) % 3
    losses = task.losses(outputs, targets)
    assert losses.shape == (7,)
    for i in range(7):
        alone = task.losses(outputs[i : i + 1], targets[i : i + 1])
        assert torch.allclose(alone[0], losses[i])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(2, 60), st.integers(0, 10_000), st.booleans())
def test_auc_is_scikit_learn_s(classes, records, seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.random((records, classes))
    if ties:
        scores = scores.round(1)
    targets = rng.integers(0, classes, records)
    occurring = [k for k in range(classes) if 0 < (targets == k).sum() < records]
    if classes == 2:
        occurring = [k for k in occurring if k == 1]
    found = auc_roc(scores, targets)
    if not occurring:
        assert found is None
        return
    expected = np.mean([roc_auc_score(targets == k, scores[:, k]) for k in occurring])
    assert found == pytest.approx(expected, abs=1e-12)


def test_majority_and_prediction():
    task = make_task(TaskSettings(labels=["no", "yes"]))
    assert task.majority(torch.tensor([0, 1, 1, 1])) == {"accuracy": 0.75, "auc_roc": 0.5}
    labels, probabilities = task.predict(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert labels == ["no", "yes"]
    assert np.allclose(probabilities.sum(1), 1)


@pytest.mark.parametrize("kind", ["module:nowhere.at.all:x", "module:math:nothing"])
def test_a_task_that_can_t_be_found_is_one_line(kind):
    with pytest.raises(ConfigError) as caught:
        make_task(TaskSettings(kind=kind, labels=["a", "b"]))
    assert len(caught.value.faults) == 1
    assert kind in caught.value.faults[0]
