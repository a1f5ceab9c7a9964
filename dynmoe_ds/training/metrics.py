"""Scores of a classifier or of a regression: the metrics of GLUE, from the predictions of the whole held-out data.

Each takes `predictions` [N] and `labels` [N], N at least 1: indices of classes, or numbers for the correlations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share (0 to 1) of right predictions."""
    return float((predictions == labels).double().mean())


def f1(predictions: Tensor, labels: Tensor) -> float:
    """The harmonic mean of precision and recall of class 1 (0 to 1); 0 where class 1 is neither there nor predicted."""
    hits = float(((predictions == 1) & (labels == 1)).sum())
    total = float((predictions == 1).sum() + (labels == 1).sum())
    return 2 * hits / total if total else 0.0


def matthews(predictions: Tensor, labels: Tensor) -> float:
    """The Matthews correlation (-1 to 1) of two classes, 0 and 1; 0 where one class is never there or predicted.

    It is the Pearson correlation of the two rows of zeros and ones.
    """
    return pearson(predictions, labels)


def pearson(predictions: Tensor, labels: Tensor) -> float:
    """The Pearson correlation (-1 to 1); 0 where one of the two is constant."""
    x, y = (values.double() - values.double().mean() for values in (predictions, labels))
    scale = float(x.norm() * y.norm())
    is_constant = any(bool((values == values[0]).all()) for values in (predictions, labels))
    return 0.0 if is_constant else float(x @ y) / scale


def spearman(predictions: Tensor, labels: Tensor) -> float:
    """The Spearman rank correlation (-1 to 1), equal values sharing their mean rank; 0 where one is constant."""
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: Tensor) -> Tensor:
    """Ranks [N] float64 from 1; equal values have the mean of the ranks that they take up."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)
    return (last - (sizes - 1) / 2).double()[group]


METRIC_FUNCTIONS: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""By the name that a metric has after `eval/`."""
