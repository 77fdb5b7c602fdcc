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

    Notes
    -----
    The area is the Mann-Whitney statistic: with ranks r (ties share their mean rank), n positives and m negatives, it
    is (sum of the positives' ranks - n (n + 1) / 2) / (n m). All labels at once, because scikit-learn's function takes
    20 ms a label and is called for every holder. Reference: Hanley & McNeil (1982), Radiology 143(1).
    """
    from scipy.stats import rankdata

    labels = np.arange(scores.shape[1]) if scores.shape[1] > 2 else np.array([1])  # two labels mirror each other
    positive = targets[:, None] == labels  # (B, K)
    n = positive.sum(0)
    m = len(targets) - n
    occurs = (n > 0) & (m > 0)
    if not occurs.any():
        return None
    ranks = rankdata(scores[:, labels[occurs]], axis=0)
    above = (ranks * positive[:, occurs]).sum(0) - n[occurs] * (n[occurs] + 1) / 2
    return float((above / (n[occurs] * m[occurs])).mean())
