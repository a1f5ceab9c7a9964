"""Which slot a row belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def slot_of_rows(num_rows: int, slot_ends: Tensor) -> Tensor:
    """Slot [N] int64 of each of `num_rows` rows sorted by slot, for slot_ends [s], the row after each slot's last.

    The last slot for rows after all ends. Nothing waits for the device.
    """
    rows = torch.arange(num_rows, device=slot_ends.device, dtype=slot_ends.dtype)
    return torch.searchsorted(slot_ends, rows, right=True).clamp_(max=len(slot_ends) - 1)
