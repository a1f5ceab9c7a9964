"""Inference on a CPU: as many slots at once as have their activations in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_ACTIVATION_BYTES = 4 << 20
"""Of one activation of the slots at once. Less costs calls, more costs memory, and time where it leaves the cache."""


def few_slots_at_once(
    compute: Callable[..., Tensor], rows: Tensor, row_weights: Tensor, rows_per_slot: list[int], *parameters: Tensor
) -> Tensor:
    """`compute(rows, row_weights, slot_ends, *parameters)` [R, D] in parts, each of neighbouring slots.

    parameters [s, ...]: the first is [s, F, D]. A part has one slot at least, and more if an activation [n, F] of them
    all stays below 4 MiB. Rows of no slot, at the end, are undefined.
    """
    parts = list(_parts(rows_per_slot, _ACTIVATION_BYTES // (parameters[0].shape[1] * rows.element_size())))
    if len(parts) < 2:
        return compute(rows, row_weights, _ends(rows_per_slot), *parameters)
    out, first = torch.empty_like(rows), 0
    for slots in parts:
        counts = rows_per_slot[slots]
        part = slice(first, first + sum(counts))
        out[part] = compute(rows[part], row_weights[part], _ends(counts), *(param[slots] for param in parameters))
        first = part.stop
    return out


def _ends(rows_per_slot: list[int]) -> Tensor:
    return torch.tensor(rows_per_slot).cumsum(0, dtype=torch.int32)


def _parts(rows_per_slot: Sequence[int], most_rows: int) -> Iterator[slice]:
    """Neighbouring slots with no more than `most_rows` rows, unless one alone has them."""
    first, num_rows = 0, 0
    for slot, count in enumerate(rows_per_slot):
        if num_rows and num_rows + count > most_rows:
            yield slice(first, slot)
            first, num_rows = slot, 0
        num_rows += count
    if num_rows:
        yield slice(first, len(rows_per_slot))
