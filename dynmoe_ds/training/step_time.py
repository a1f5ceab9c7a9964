"""Where the time of the steps since the last log line went, and the memory that they took."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe_ds.distributed import Cause
from dynmoe_ds.telemetry import Metric

GIB = 2**30


def step_time_metrics(
    elapsed_s: float, num_steps: int, stalls: Mapping[Cause, Sequence[float]], device: torch.device, *, per_rank: bool
) -> list[Metric]:
    """Seconds per step, and the four parts that they are the sum of: means over ranks, so that every rank counts alike.

    elapsed_s: of this rank for `num_steps` steps. stalls: of this rank, as `StallClock.take` gives them. per_rank:
    whether the computation of each rank is told, too.

    A collective ends for all ranks at once, and cannot begin before the last one has come. So the shortest of its
    stalls is communication, and what the others stand still longer is waiting for that last rank. A rank that has
    taken less time than another one waits for it at the log line.

    Collective: one all-gather of four numbers, and an all-reduce of as many as there were stalls.
    """
    own = [float(len(stalls["communication"])), elapsed_s, sum(stalls["communication"]), sum(stalls["data"])]
    per_rank_s = torch.stack(_gather(torch.tensor(own, dtype=torch.float64, device=device))).cpu()
    num_stalls, elapsed, stalled, loading = per_rank_s.unbind(1)
    # Were they not as many on every rank, they could be compared as a whole only.
    is_comparable = bool((num_stalls == num_stalls[0]).all())
    seconds = stalls["communication"] if is_comparable else [sum(stalls["communication"])]
    total = float(elapsed.max())
    communication = _least_over_ranks(seconds, device)
    wait = max(0.0, float(stalled.mean()) - communication) + total - float(elapsed.mean())
    data = float(loading.mean())
    parts = {
        "train/step_time_s": total,
        "train/compute_time_s": total - communication - wait - data,
        "train/communication_time_s": communication,
        "train/wait_time_s": wait,
        "train/data_time_s": data,
    }
    if per_rank:
        computing = (elapsed - stalled - loading).tolist()
        parts |= {f"train/compute_time_s/{rank}": value for rank, value in enumerate(computing)}
    return [Metric(name=name, value=value / num_steps, reduction="last") for name, value in parts.items()]


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held, in GiB: on an accelerator what torch has allocated there since
    `reset_peak_memory`, on a CPU what is resident since the process began.
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def reset_peak_memory(device: torch.device) -> None:
    """Begin anew where that is possible: on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def _gather(own: Tensor) -> list[Tensor]:
    if dist.get_world_size() == 1:
        return [own]
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return everyone


def _least_over_ranks(seconds: Sequence[float], device: torch.device) -> float:
    """The sum of the least of each over ranks."""
    least = torch.tensor(seconds, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1 and len(seconds) > 0:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least.sum())
