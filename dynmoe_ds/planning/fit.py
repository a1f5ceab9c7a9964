"""A cluster's rates from measured steps: non-negative least squares on what each step did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dynmoe_ds.planning.cluster import Cluster, FlopRates, HeldOutError, Link
from dynmoe_ds.planning.layout import Layout
from dynmoe_ds.planning.step_time import step_time
from dynmoe_ds.planning.work import Work

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStep:
    """What a step did and how long it took. slowdown: ranks per processor while it ran."""

    work: Work
    layout: Layout
    slowdown: float
    step_s: float


def nonnegative_least_squares(matrix: Array, target: Array) -> Array:
    """The x ≥ 0 [n] that makes `‖matrix x − target‖` least, for matrix [m, n] and target [m].

    Source: Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23: columns enter one at a time, by the
    greatest gradient, and leave where their value would turn negative.
    """
    num_columns = matrix.shape[1]
    x, is_free = np.zeros(num_columns), np.zeros(num_columns, dtype=bool)
    tolerance = 1e-10 * max(float(np.abs(matrix.T @ target).max(initial=0.0)), 1e-300)
    for _ in range(3 * num_columns + 10):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[is_free] = -np.inf
        entering = int(gradient.argmax())
        if gradient[entering] <= tolerance:
            break
        is_free[entering] = True
        while True:
            trial = np.zeros(num_columns)
            trial[is_free] = np.linalg.lstsq(matrix[:, is_free], target, rcond=None)[0]
            negative = is_free & (trial <= 0)
            if not negative.any():
                break
            # As far from x towards the trial as all stay at or above 0; who gets there leaves.
            step = float((x[negative] / (x[negative] - trial[negative])).min())
            x = x + step * (trial - x)
            is_free &= x > 1e-12 * max(float(x.max()), 1e-300)
            x[~is_free] = 0.0
        x = trial
    return x


def fit_cluster(steps: Sequence[MeasuredStep], template: Cluster) -> Cluster:
    """`template` with the rates and fixed costs that predict `steps`, of one node and in float32, best.

    Errors count relative to the measured time, so that short steps weigh as much as long ones.
    """
    rows = np.array([_features(step.work) for step in steps], dtype=np.float64)
    measured = np.array([step.step_s / step.slowdown for step in steps])
    matrix = rows / measured[:, None]
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    seconds = nonnegative_least_squares(matrix / scale, np.ones(len(steps))) / scale
    dense, experts, memory, entries, layer, slot, micro, tensor, fetch, update, sent, collective = map(float, seconds)
    return replace(
        template,
        float32=FlopRates(dense=_rate(dense), experts=_rate(experts)),
        memory_bytes_per_s=_rate(memory),
        router_entries_per_s=_rate(entries),
        layer_s=layer,
        slot_s=slot,
        micro_step_s=micro,
        tensor_s=tensor,
        fetch_s=fetch,
        optimizer_bytes_per_s=_rate(update),
        within_node=Link(bytes_per_s=_rate(sent), latency_s=collective),
    )


def _features(work: Work) -> tuple[float, ...]:
    """What the unknown seconds are multiplied by, in the order of `fit_cluster`."""
    sent = work.dispatch + work.synchronisation
    assert not sent.collectives_between, "a fit has links within a node only"
    return (
        work.dense_flops, work.expert_flops, work.memory_bytes, work.router_entries, work.layer_passes,
        work.slot_passes, work.micro_steps, work.tensors, work.fetches, work.optimizer_bytes, sent.bytes_within,
        sent.collectives_within,
    )  # fmt: skip


def predicted_time(step: MeasuredStep, cluster: Cluster) -> float:
    """Seconds that the model expects of a measured step, with as many ranks per processor as it had."""
    alone = replace(cluster, ranks_per_node=1, processors_per_node=1)
    return step.slowdown * step_time(step.work, step.layout, alone).total


def held_out_error(time_ratios: Sequence[float], memory_ratios: Sequence[float]) -> HeldOutError:
    """The errors of predicted / measured ratios, one of each per layout."""
    time, memory = np.abs(np.array(time_ratios) - 1), np.abs(np.array(memory_ratios) - 1)
    return HeldOutError(
        num_layouts=len(time_ratios),
        median_time_error=float(np.median(time)),
        worst_time_error=float(time.max()),
        median_memory_error=float(np.median(memory)),
        worst_memory_error=float(memory.max()),
        time_ratios=(min(time_ratios), max(time_ratios)),
        memory_ratios=(min(memory_ratios), max(memory_ratios)),
    )


def _rate(seconds: float) -> float | None:
    return 1 / seconds if seconds > 0 else None
