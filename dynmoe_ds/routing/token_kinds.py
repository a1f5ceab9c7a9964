"""Token kinds: how many experts tokens of each kind take, where the data say of what kind a token is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynmoe_ds.errors import RoutingError
from dynmoe_ds.routing.records import RoutingRecords

TOKENS, ASSIGNMENTS = "tokens_per_kind", "assignments_per_kind"
UNDECLARED, MISSHAPEN = "tokens_of_undeclared_kind", "passes_with_misshapen_kinds"
KIND_STATISTICS = (TOKENS, ASSIGNMENTS, UNDECLARED, MISSHAPEN)


def kind_shapes(num_kinds: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the statistics of `count_kinds` by name; none without kinds."""
    if num_kinds == 0:
        return {}
    return {TOKENS: (num_kinds,), ASSIGNMENTS: (num_kinds,), UNDECLARED: (), MISSHAPEN: ()}


def count_kinds(
    mask: Tensor, real: Tensor | None, kinds: Tensor | None, num_kinds: int, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """Additive statistics, float64, of one routing; all zero without `kinds`.

    mask [T, S] bool: the experts of each token. real [T] bool: False for padding, which is of no kind. kinds int64: a
    kind from 0 to `num_kinds` - 1 for every token, negative for none. shape: that of the tokens as the layer sees them,
    [B, L] or, where the model has flattened them, [T]; `kinds` must have it, or be [B, L] for a flattened [B·L].

    A wrong shape and a kind that is too large are counted as well and raise an error where the numbers are read, after
    they have been summed over ranks: an error here would leave the other ranks waiting, and looking at the values would
    make every forward pass wait for the device.
    """
    device = mask.device
    counts = {
        name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in kind_shapes(num_kinds).items()
    }
    if kinds is None or num_kinds == 0:
        return counts
    if kinds.shape != shape and (len(shape) != 1 or kinds.numel() != shape[0]):
        return counts | {MISSHAPEN: torch.ones((), dtype=torch.float64, device=device)}
    column = kinds.to(device).reshape(-1, 1)
    if real is not None:
        column = column.masked_fill(~real[:, None], -1)
    is_of_kind = column == torch.arange(num_kinds, device=device)
    return counts | {
        TOKENS: is_of_kind.sum(0).double(),
        ASSIGNMENTS: (is_of_kind * mask.sum(1, keepdim=True)).sum(0).double(),
        UNDECLARED: (column >= num_kinds).sum().double(),
    }


def mean_k_per_kind(record: RoutingRecords) -> list[float]:
    """Experts per real token of each kind, fallback included; NaN for a kind without tokens. As `kind_totals`."""
    return [math.nan if tokens == 0 else chosen / tokens for tokens, chosen in kind_totals(record)]


def kind_totals(record: RoutingRecords) -> list[tuple[float, float]]:
    """Real tokens of each kind, and how many experts they took, fallback included. Waits for the device.

    Empty where no kinds were declared. Raises: RoutingError for tokens of an undeclared kind or `token_kinds` of a
    wrong shape; for records that are summed over ranks, on every rank alike.
    """
    if TOKENS not in record.statistics:
        return []
    tokens, assignments, undeclared, misshapen = (
        record.statistics[name].tolist() for name in (TOKENS, ASSIGNMENTS, UNDECLARED, MISSHAPEN)
    )
    if misshapen:
        raise RoutingError(
            f"token_kinds had another shape than the tokens in {misshapen:.0f} forward passes of a layer. Give int64 "
            "of the shape of the tokens [B, L]: one kind per token, -1 for none."
        )
    if undeclared:
        raise RoutingError(
            f"{undeclared:.0f} tokens have a kind above {len(tokens) - 1}, but {len(tokens)} kinds are declared. Name "
            "every kind in dynmoe_ds.initialize(token_kinds=...), or give -1 to tokens without a kind."
        )
    return list(zip(tokens, assignments, strict=True))
