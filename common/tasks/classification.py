"""Classification: one label a record, cross-entropy, accuracy and AUC-ROC. B records, K labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedhead.common.config.schema import TaskSettings


class Classification:
    """One label a record.

    Parameters
    ----------
    settings : TaskSettings
        `labels` in the order of the head's outputs.
    """

    closed_form = "cross-entropy"

    def __init__(self, settings: TaskSettings) -> None:
        self.labels = settings.labels

    @property
    def outputs(self) -> int:
        """K, one output a label."""
        return len(self.labels)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each record: (B, K), (B,) -> (B,)."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Accuracy, AUC-ROC (one against the rest, mean over labels that occur) and mean loss on public records.

        `auc_roc` is NaN-free: it is left out when fewer than two labels occur among the targets.
        """
        accuracy = (outputs.argmax(1) == targets).double().mean().item()
        found = {"accuracy": accuracy, "loss": F.cross_entropy(outputs.double(), targets).item()}
        auc = auc_roc(outputs.double().softmax(1).cpu().numpy(), targets.cpu().numpy())
        return found if auc is None else {**found, "auc_roc": auc}

    def majority(self, targets: Tensor) -> dict[str, float]:
        """Accuracy and AUC-ROC of always answering the most frequent label."""
        return {"accuracy": torch.bincount(targets).max().item() / len(targets), "auc_roc": 0.5}

    def predict(self, outputs: Tensor) -> tuple[list[str], np.ndarray]:
        """Most probable label and all probabilities: (B, K) -> B labels, (B, K) array."""
        probabilities = outputs.double().softmax(1).cpu().numpy()
        return [self.labels[i] for i in probabilities.argmax(1)], probabilities


def auc_roc(scores: np.ndarray, targets: np.ndarray) -> float | None:
    """Area under the ROC curve, mean of one label against the rest over the labels that occur.

    Parameters
    ----------
    scores : array, shape (B, K)
    targets : int array, shape (B,)

    Returns
    -------
    float or None
        None when fewer than two labels occur.
    """
    from sklearn.metrics import roc_auc_score

    occurring = [k for k in range(scores.shape[1]) if 0 < (targets == k).sum() < len(targets)]
    if not occurring:
        return None
    if scores.shape[1] == 2:
        occurring = [1]
    return float(np.mean([roc_auc_score(targets == k, scores[:, k]) for k in occurring]))
