"""Every number that a run may log: its name, its meaning, and how it is combined over ranks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist

from dynmoe_ds.errors import ConfigError, DivergenceError

Reduction = Literal["mean", "sum", "max", "min", "last"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

LAYER_SUFFIX = "/<layer>"

METRICS: dict[str, str] = {
    "train/loss": "Cross-entropy of the training batches since the last log line, in nats per token.",
    "train/aux_loss": "Sum of the routers' weighted auxiliary losses, added to train/loss for the gradient.",
    "train/learning_rate": "Learning rate of the step.",
    "train/gradient_norm": "L2 norm of the gradient before clipping.",
    "train/tokens_per_second": "Training tokens of all ranks per second of wall-clock time.",
    "train/tokens_seen": "Training tokens of all ranks since step 0.",
    "train/step_time_s": "Wall-clock seconds per optimiser step.",
    "eval/loss": "Cross-entropy of the held-out data, in nats per token.",
    "moe/mean_k": "Experts chosen per token, averaged over tokens and layers.",
    "moe/mean_k/<layer>": "Experts chosen per token in one layer.",
    "moe/live_experts/<layer>": "Experts that exist in one layer.",
    "moe/unrouted_share/<layer>": "Share (0 to 1) of one layer's tokens that chose no expert.",
    "moe/busiest_share/<layer>": "Share (0 to 1) of one layer's tokens that chose its busiest expert.",
}
"""Every metric name and its meaning. `<layer>` stands for the name of a layer."""


def meaning_of(name: str) -> str:
    """The meaning of a metric name; a per-layer name carries its layer: `moe/mean_k/model.layers.1.mlp`.

    Raises: ConfigError for a name that is not listed in `METRICS`.
    """
    if LAYER_SUFFIX not in name:
        if name in METRICS:
            return METRICS[name]
        group, _, rest = name.partition("/")
        quantity, _, layer = rest.partition("/")
        family = f"{group}/{quantity}{LAYER_SUFFIX}"
        if layer and family in METRICS:
            return METRICS[family]
    raise ConfigError(
        f"There is no metric {name!r}. Use one of {', '.join(METRICS)}, or add the name and its meaning to METRICS in "
        f"dynmoe_ds/telemetry/metrics.py."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One logged number. `reduction` says how the values of several ranks become one.

    mean: the plain mean over ranks, each rank counting the same. last: the value of the group's first rank, for what
    is equal everywhere (the learning rate).

    Raises: ConfigError for a name that is not in `METRICS`, an unknown reduction, or a value that is no number.
    """

    name: str
    value: float
    reduction: Reduction

    def __post_init__(self) -> None:
        meaning_of(self.name)
        if self.reduction not in REDUCTIONS:
            raise ConfigError(
                f"Metric {self.name} has the reduction {self.reduction!r}. Use one of {', '.join(REDUCTIONS)}."
            )
        if not isinstance(self.value, int | float):
            raise ConfigError(
                f"Metric {self.name} has a value of type {type(self.value).__name__}. Give a Python number; "
                f"`tensor.item()` makes one of a tensor."
            )


def reduce_over_ranks(metrics: Sequence[Metric], group: dist.ProcessGroup | None = None) -> list[Metric]:
    """The same metrics with the values of all ranks combined, in the caller's order; equal on every rank.

    Without an initialised torch.distributed the values are returned as they are. A NaN on any rank makes a mean, sum,
    max or min NaN.

    Collective: two all-gathers over `group` (None: all ranks); one where nothing is logged. Every rank of the group
    joins, with the same names and reductions in any order.
    Raises: ConfigError for a name that appears twice; DivergenceError where ranks log different metrics. Both on every
    rank, so that no rank waits for one that has failed.
    """
    ordered = sorted(metrics, key=lambda metric: metric.name)
    if not (dist.is_available() and dist.is_initialized()):
        _refuse_duplicates([_keys(ordered)])
        return list(metrics)

    device = _collective_device(group)
    _check_same_metrics(ordered, group, device)
    if not ordered:
        return []
    values = torch.tensor([metric.value for metric in ordered], dtype=torch.float64, device=device)
    per_rank = torch.stack(_all_gather(values, group)).cpu()
    reduced = {
        metric.name: Metric(name=metric.name, value=_combine(column, metric.reduction), reduction=metric.reduction)
        for metric, column in zip(ordered, per_rank.unbind(dim=1), strict=True)
    }
    return [reduced[metric.name] for metric in metrics]


def _combine(values: torch.Tensor, reduction: Reduction) -> float:
    """One number from the values [ranks] of one metric. torch's mean, sum, max and min all pass a NaN on."""
    if reduction == "last":
        return float(values[0])
    return float(getattr(torch, reduction)(values))


def _keys(ordered: Sequence[Metric]) -> list[tuple[str, str]]:
    return [(metric.name, metric.reduction) for metric in ordered]


def _check_same_metrics(ordered: Sequence[Metric], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Refuse, on every rank, names that appear twice on one rank or differ between ranks.

    Collective: one all-gather of two integers; where something is wrong, one more of the names for the message.
    """
    keys = _keys(ordered)
    digest = hashlib.sha256(repr(keys).encode()).digest()
    fingerprint = int.from_bytes(digest[:8], "big", signed=True)
    has_duplicates = int(len({name for name, _ in keys}) < len(keys))
    summary = torch.tensor([fingerprint, has_duplicates], dtype=torch.int64, device=device)
    summaries = [tuple(gathered.tolist()) for gathered in _all_gather(summary, group)]
    if all(other == (fingerprint, 0) for other in summaries):
        return
    keys_per_rank: list[list[tuple[str, str]]] = [[] for _ in summaries]
    dist.all_gather_object(keys_per_rank, keys, group=group)
    _refuse_duplicates(keys_per_rank)
    everything = {key for keys in keys_per_rank for key in keys}
    lacking = []
    for rank, keys in enumerate(keys_per_rank):
        absent = sorted(everything.difference(keys))
        if absent:
            lacking.append(f"rank {rank} lacks {', '.join(f'{name} ({reduction})' for name, reduction in absent)}")
    raise DivergenceError(
        f"Ranks log different metrics: {'; '.join(lacking)}. Log the same names with the same reductions on every rank."
    )


def _refuse_duplicates(keys_per_rank: Sequence[Sequence[tuple[str, str]]]) -> None:
    for rank, keys in enumerate(keys_per_rank):
        for name, count in Counter(name for name, _ in keys).items():
            if count > 1:
                raise ConfigError(f"Rank {rank} logs metric {name} {count} times in one step. Log each name once.")


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor, group=group)
    return gathered


def _collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend wants its tensors: the CPU for gloo and MPI, the accelerator otherwise."""
    if dist.get_backend(group) in ("gloo", "mpi"):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, f"backend {dist.get_backend(group)!r} without an accelerator"
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
