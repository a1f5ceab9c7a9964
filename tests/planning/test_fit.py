"""The fit: least squares against trying every set of columns, and rates that are known beforehand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from benchmarks.scale.design import design
from dynmoe_ds.planning import Link, shape_of, step_time, work_per_rank
from dynmoe_ds.planning.cluster import FlopRates
from dynmoe_ds.planning.fit import MeasuredStep, fit_cluster, held_out_error, nonnegative_least_squares, predicted_time
from tests.planning.examples import cluster


def _best_of_all_sets(matrix: np.ndarray, target: np.ndarray) -> float:
    """The least squared error over all subsets of columns whose own solution is not negative."""
    least = float(target @ target)
    for size in range(1, matrix.shape[1] + 1):
        for chosen in combinations(range(matrix.shape[1]), size):
            part = matrix[:, chosen]
            x = np.linalg.lstsq(part, target, rcond=None)[0]
            if (x >= 0).all():
                least = min(least, float(((part @ x - target) ** 2).sum()))
    return least


@pytest.mark.parametrize("seed", range(20))
def test_least_squares_against_every_set_of_columns(seed) -> None:
    draw = np.random.default_rng(seed)
    matrix, target = draw.normal(size=(9, 5)), draw.normal(size=9)
    x = nonnegative_least_squares(matrix, target)
    assert (x >= 0).all() and (seed > 3 or (x == 0).any())
    assert ((matrix @ x - target) ** 2).sum() == pytest.approx(_best_of_all_sets(matrix, target), rel=1e-9)


def test_a_target_that_no_column_points_at_gives_zeros() -> None:
    assert nonnegative_least_squares(-np.ones((3, 2)), np.ones(3)).tolist() == [0.0, 0.0]


TRUTH = cluster(
    ranks_per_node=1, processors_per_node=1, float32=FlopRates(dense=4e10, experts=3e10), memory_bytes_per_s=5e9,
    optimizer_bytes_per_s=4e9, router_entries_per_s=2e7, layer_s=1e-4, slot_s=3e-5, micro_step_s=2e-3, tensor_s=5e-5,
    fetch_s=1e-4, within_node=Link(bytes_per_s=8e8, latency_s=2e-4), overlap=0.0,
)  # fmt: skip


def _steps(role: str, noise: np.random.Generator | None = None) -> list[MeasuredStep]:
    """The benchmark's own design, timed by the model itself under `TRUTH`."""
    found = []
    for case in design():
        if case.role != role:
            continue
        work, slowdown = work_per_rank(shape_of(case.config(), None), case.layout()), max(1.0, case.num_ranks / 2)
        seconds = slowdown * step_time(work, case.layout(), TRUTH).total
        seconds *= 1.0 if noise is None else float(np.exp(0.03 * noise.normal()))
        found.append(MeasuredStep(work=work, layout=case.layout(), slowdown=slowdown, step_s=seconds))
    return found


def test_the_design_tells_all_rates_apart() -> None:
    fitted = fit_cluster(_steps("fit"), TRUTH)
    assert fitted.float32 is not None and TRUTH.float32 is not None
    for name in ("memory_bytes_per_s", "optimizer_bytes_per_s", "router_entries_per_s", "layer_s", "slot_s",
                 "micro_step_s", "tensor_s", "fetch_s"):  # fmt: skip
        assert getattr(fitted, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3), name
    assert fitted.float32.dense == pytest.approx(TRUTH.float32.dense, rel=1e-3)
    assert fitted.float32.experts == pytest.approx(TRUTH.float32.experts, rel=1e-3)
    assert fitted.within_node.bytes_per_s == pytest.approx(8e8, rel=1e-3)
    assert fitted.within_node.latency_s == pytest.approx(2e-4, rel=1e-3)


def test_with_noise_of_3_percent_held_out_layouts_are_predicted_to_a_few_percent() -> None:
    fitted = fit_cluster(_steps("fit", np.random.default_rng(0)), TRUTH)
    ratios = [predicted_time(step, fitted) / step.step_s for step in _steps("held out")]
    assert len(ratios) > 15 and max(abs(ratio - 1) for ratio in ratios) < 0.1


def test_errors_are_of_ratios() -> None:
    error = held_out_error([0.5, 1.1, 1.2], [1.0, 1.0, 1.25])
    assert (error.num_layouts, error.worst_time_error, error.median_time_error) == (3, 0.5, pytest.approx(0.2))
    assert (error.median_memory_error, error.worst_memory_error) == (0.0, 0.25)
    assert (error.time_ratios, error.memory_ratios) == ((0.5, 1.2), (1.0, 1.25))
