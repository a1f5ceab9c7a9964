"""Against scikit-learn 1.9.1 and SciPy 1.17.1, whose numbers are written down here, and against the definitions."""

import math

import pytest
import torch

from dynmoe_ds.data.glue_tasks import GLUE_TASKS
from dynmoe_ds.training.metrics import METRIC_FUNCTIONS, accuracy, f1, matthews, pearson, spearman

PREDICTIONS = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1, 1])
LABELS = torch.tensor([1, 0, 0, 1, 0, 1, 1, 0, 0, 1])
NUMBERS = torch.tensor([4.1, 0.2, 3.3, 2.5, 2.5, 1.0, 5.2], dtype=torch.float64)
SCORES = torch.tensor([4.75, 0.0, 3.2, 2.5, 3.2, 2.5, 5.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("metric", "predictions", "labels", "reference"),
    [
        (accuracy, PREDICTIONS, LABELS, 0.7),
        (f1, PREDICTIONS, LABELS, 0.7272727272727273),  # sklearn.metrics.f1_score
        (matthews, PREDICTIONS, LABELS, 0.408248290463863),  # sklearn.metrics.matthews_corrcoef
        (pearson, NUMBERS, SCORES, 0.9289602537015726),  # scipy.stats.pearsonr
        (spearman, NUMBERS, SCORES, 0.954168596442846),  # scipy.stats.spearmanr, with ties in both
    ],
)
def test_metrics_agree_with_the_libraries(metric, predictions, labels, reference):
    assert metric(predictions, labels) == pytest.approx(reference, abs=1e-12)


def test_f1_and_matthews_by_their_counts():
    """True and false positives and negatives, counted one by one."""
    generator = torch.Generator().manual_seed(0)
    predictions, labels = torch.randint(2, (2, 400), generator=generator)
    tp = fp = tn = fn = 0
    for predicted, true in zip(predictions.tolist(), labels.tolist(), strict=True):
        tp, fp = tp + (predicted and true), fp + (predicted and not true)
        tn, fn = tn + (not predicted and not true), fn + (not predicted and true)
    assert f1(predictions, labels) == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-12)
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(predictions, labels) == pytest.approx((tp * tn - fp * fn) / scale, abs=1e-12)


@pytest.mark.parametrize("metric", [matthews, pearson, spearman])
def test_correlation_with_a_constant_is_zero(metric):
    constant, varying = torch.ones(4), torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert metric(constant, varying) == metric(varying, constant) == metric(constant, constant) == 0.0
    # The mean of these is not exactly 0.1, so that the differences from it are not exactly 0.
    assert metric(torch.full((3,), 0.1, dtype=torch.float64), torch.arange(3)) == 0.0


def test_f1_without_the_class_is_zero():
    assert f1(torch.zeros(3), torch.zeros(3)) == 0.0
    assert f1(torch.ones(3), torch.zeros(3)) == 0.0


@pytest.mark.parametrize("metric", METRIC_FUNCTIONS.values())
def test_perfect_predictions_score_one(metric):
    labels = torch.tensor([1, 0, 0, 1])
    assert metric(labels, labels) == pytest.approx(1.0, abs=1e-12)


def test_spearman_sees_the_order_alone():
    assert spearman(NUMBERS, NUMBERS.exp()) == pytest.approx(1.0, abs=1e-12)
    assert pearson(NUMBERS, NUMBERS.exp()) < 0.95


def test_the_metrics_of_every_task_exist():
    assert {metric for task in GLUE_TASKS.values() for metric in task.metrics} <= set(METRIC_FUNCTIONS)
