"""The sum of every slot's rows: gradients of biases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import use_triton


def sum_slots(rows: Tensor, slot_ends: Tensor) -> Tensor:
    """Sums [s, F] of the rows of each slot, for rows [N, F] sorted by slot.

    slot_ends [s] int32: the row after each slot's last. Zero for a slot without rows; rows after all ends belong to
    none. Accumulated in float32 (float64 for float64) in a fixed order, without atomics, and rounded once.
    """
    if use_triton(rows, slot_ends):
        from .jit.sum_slots import launch_sum_slots

        return launch_sum_slots(rows, None, slot_ends)
    return sum_slots_torch(rows, slot_ends)


def sum_slots_torch(rows: Tensor, slot_ends: Tensor) -> Tensor:
    """The twin of `sum_slots`."""
    every_row = torch.arange(len(rows), device=rows.device)
    # One bag more, as in `sum_rows`.
    return F.embedding_bag(every_row, rows.contiguous(), F.pad(slot_ends.long(), (1, 0)), mode="sum")[:-1]
