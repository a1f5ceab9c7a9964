"""Every number that a run may log: its name, its meaning, and how it is combined over ranks."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
import torch.distributed as dist

from dynmoe_ds.errors import ConfigError, DivergenceError

Tier = Literal["brief", "detailed"]
Reduction = Literal["mean", "sum", "max", "min", "last"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

# What a name may hold in the place of a word in angle brackets. A layer's name may have slashes.
PLACES = {"<layer>": ".+", "<kind>": "[^/]+", "<rank>": r"\d+", "<value>": "[^/]+"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedMetric:
    """What a name means, and whether trackers get it always or only with `telemetry.detail=detailed`."""

    meaning: str
    tier: Tier


def _brief(meaning: str) -> ListedMetric:
    return ListedMetric(meaning=meaning, tier="brief")


def _detailed(meaning: str) -> ListedMetric:
    return ListedMetric(meaning=meaning, tier="detailed")


METRICS: dict[str, ListedMetric] = {
    "train/loss": _brief("Loss of the training batches since the last log line: see eval/loss."),
    "train/aux_loss": _brief("Sum of the routers' weighted auxiliary losses, added to train/loss for the gradient."),
    "train/learning_rate": _brief("Learning rate of the step."),
    "train/gradient_norm": _brief("L2 norm of the gradient before clipping."),
    "train/tokens_per_second": _brief("Training tokens of all ranks per second of wall-clock time."),
    "train/tokens_seen": _brief("Training tokens of all ranks since step 0."),
    "train/step_time_s": _brief("Wall-clock seconds per optimiser step, of the slowest rank."),
    "train/compute_time_s": _brief("Of these, the seconds that are in none of the next three, mean over ranks."),
    "train/compute_time_s/<rank>": _detailed("The same of one rank: the one with most holds up the others."),
    "train/communication_time_s": _brief(
        "Of these, the seconds of collectives that the computation stood still for, all ranks being there."
    ),
    "train/wait_time_s": _brief(
        "Of these, the seconds for which ranks stood still until the last one came, mean over ranks."
    ),
    "train/data_time_s": _brief(
        "Of these, the seconds for which the computation stood still for its next batch, mean over ranks."
    ),
    "train/peak_memory_gib": _brief(
        "Most memory of a rank: GPU memory allocated since the last line; on a CPU resident since the start."
    ),
    "train/skipped_steps": _brief("Steps since step 0 whose update was left out for NaN or infinity."),
    "train/left_out_samples": _brief(
        "Training samples left out because an image cannot be decoded, since the process began."
    ),
    "eval/loss": _brief(
        "Cross-entropy of the held-out data in nats, per token of text or per example; else squared error."
    ),
    "eval/accuracy": _brief("Share (0 to 1) of held-out examples whose class is the model's first answer."),
    "eval/exact_match": _brief("Share (0 to 1) of held-out answers whose every token is the model's first choice."),
    "eval/exact_match/<kind>": _brief("As eval/exact_match, of the samples of one kind."),
    "eval/f1": _brief("Harmonic mean of precision and recall of class 1 on the held-out examples, 0 to 1."),
    "eval/matthews": _brief("Matthews correlation of answers and classes of the held-out examples, -1 to 1."),
    "eval/pearson": _brief("Pearson correlation of answers and scores of the held-out examples, -1 to 1."),
    "eval/spearman": _brief("Spearman rank correlation of answers and scores of the held-out examples, -1 to 1."),
    "eval/score": _brief("Mean of the metrics of a GLUE task, by which its table and its best epoch go."),
    "eval/loss_mismatched": _brief("As eval/loss, on the mismatched part of MNLI."),
    "eval/accuracy_mismatched": _brief("As eval/accuracy, on the mismatched part of MNLI."),
    "moe/mean_k": _brief("Experts chosen per token, averaged over tokens and layers."),
    "moe/mean_k/<layer>": _detailed("Experts chosen per token in one layer."),
    "moe/mean_k_per_kind/<kind>": _detailed("Experts chosen per token of one kind, averaged over layers."),
    "moe/mean_k_per_kind/<kind>/<layer>": _detailed("Experts chosen per token of one kind in one layer."),
    "moe/mean_k_per_modality/image": _detailed("Experts chosen per token of an image, whatever is asked."),
    "moe/mean_k_per_modality/text": _detailed("Experts chosen per token of text, whatever is asked."),
    "moe/mean_k_per_question/<kind>": _detailed("Experts chosen per token of samples of one kind, images and text."),
    "moe/active_parameters": _brief(
        "Parameters that an average token meets: all but the experts, and the experts it chose."
    ),
    "moe/forward_flops_per_token": _detailed("FLOPs of matrix products in the forward pass of an average token."),
    "moe/training_flops_per_token": _brief(
        "FLOPs of matrix products in training on an average token: three times as many."
    ),
    "moe/live_experts/<layer>": _brief("Experts that exist in one layer."),
    "moe/slots/<layer>": _detailed("Slots of one layer's pool: live experts and free places."),
    "moe/unrouted_share/<layer>": _detailed("Share (0 to 1) of one layer's tokens that chose no expert."),
    "moe/busiest_share/<layer>": _detailed("Share (0 to 1) of one layer's tokens that chose its busiest expert."),
    "moe/load_entropy/<layer>": _detailed(
        "Evenness of one layer's load: entropy of its K experts' shares over ln K, 0 to 1."
    ),
    "moe/rank_imbalance": _brief(
        "Rows of the busiest rank over the mean of its group, of all layers, each by its rows."
    ),
    "moe/rank_imbalance/<layer>": _detailed(
        "The same of one layer: 1 for equal work, ep_size if one rank has all of it."
    ),
    "moe/controller/<value>/<layer>": _detailed(
        "A value that one layer's router sets by itself, such as its budget's control."
    ),
    "moe/sent_row_bytes_per_token": _brief(
        "Bytes of rows that ranks send to each other per training token, in all layers."
    ),
    "moe/least_row_bytes_per_token": _brief(
        "The fewest such bytes that the tokens' choices allow, straight to each rank."
    ),
    "moe/sent_metadata_bytes_per_token": _brief(
        "Bytes of counts, slots and weights that ranks send to each other per token."
    ),
    "eval/mean_k": _brief("Experts chosen per held-out token, averaged over tokens and layers."),
    "eval/mean_k/<layer>": _detailed("Experts chosen per held-out token in one layer."),
    "eval/mean_k_per_kind/<kind>": _detailed("Experts chosen per held-out token of one kind, averaged over layers."),
    "eval/mean_k_per_kind/<kind>/<layer>": _detailed("Experts chosen per held-out token of one kind in one layer."),
    "eval/mean_k_per_modality/image": _detailed("Experts chosen per held-out token of an image, whatever is asked."),
    "eval/mean_k_per_modality/text": _detailed("Experts chosen per held-out token of text, whatever is asked."),
    "eval/mean_k_per_question/<kind>": _detailed(
        "Experts chosen per held-out token of samples of one kind, images and text."
    ),
    "eval/active_parameters": _brief("Parameters that an average held-out token meets."),
    "eval/forward_flops_per_token": _detailed(
        "FLOPs of matrix products in the forward pass of an average held-out token."
    ),
    "eval/unrouted_share/<layer>": _detailed(
        "Share (0 to 1) of one layer's held-out tokens that chose no expert by themselves."
    ),
    "eval/busiest_share/<layer>": _detailed(
        "Share (0 to 1) of one layer's held-out tokens that chose its busiest expert."
    ),
    "eval/load_entropy/<layer>": _detailed("Evenness of one layer's load by held-out tokens, as moe/load_entropy."),
}
"""Every metric name, its meaning and its tier. `<layer>` stands for the name of a layer, `<kind>` for that of a kind of
tokens, `<rank>` for a rank, `<value>` for one of a router's own (`Router.observables`)."""

OF_THE_MACHINE: frozenset[str] = frozenset(
    {
        "train/tokens_per_second",
        "train/step_time_s",
        "train/compute_time_s",
        "train/communication_time_s",
        "train/wait_time_s",
        "train/data_time_s",
        "train/peak_memory_gib",
    }
)
"""What clocks and memory said, all of a run or rank by rank."""


def is_of_the_machine(key: str) -> bool:
    """Whether a key of a line of metrics may differ between two runs that are otherwise the same."""
    return key == "time_s" or not OF_THE_MACHINE.isdisjoint((key, key.rpartition("/")[0]))


def meaning_of(name: str) -> str:
    """The meaning of a metric name; a per-layer name carries its layer: `moe/mean_k/model.layers.1.mlp`.

    Raises: as `tier_of`.
    """
    return _listed(name).meaning


def tier_of(name: str) -> Tier:
    """The tier of a metric name.

    Raises: ConfigError for a name that is not listed in `METRICS`.
    """
    return _listed(name).tier


@cache
def _listed(name: str) -> ListedMetric:
    if not any(place in name for place in PLACES):
        if name in METRICS:
            return METRICS[name]
        for listed, metric in METRICS.items():
            if _pattern(listed).fullmatch(name):
                return metric
    raise ConfigError(
        f"There is no metric {name!r}. Use one of {', '.join(METRICS)}, or add the name and its meaning to METRICS in "
        f"dynmoe_ds/telemetry/metrics.py."
    )


@cache
def _pattern(listed: str) -> re.Pattern[str]:
    """What the names look like that a listed one stands for."""
    pattern = re.escape(listed)
    for place, form in PLACES.items():
        pattern = pattern.replace(place, form)
    return re.compile(pattern)


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
