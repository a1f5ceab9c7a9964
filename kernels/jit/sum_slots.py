"""The sum of every slot's rows, with or without a weight per row, in float32, in a fixed order, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import check_shapes, launch

SUM_SLOTS_BLOCKS = {"BLOCK_N": 32, "BLOCK_F": 64}


@triton.jit
def sum_slots_kernel(
    rows, row_weights, slot_ends, sums, F, HAS_WEIGHTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr
):
    """rows [N, F] sorted by slot -> sums [S, F]. Grid: slots, blocks of columns."""
    slot = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    first = tl.load(slot_ends + slot - 1, mask=slot > 0, other=0)
    last = tl.load(slot_ends + slot)
    total = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for start in range(first, last, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (row[:, None] < last) & (f[None, :] < F)
        values = tl.load(rows + row[:, None] * F + f[None, :], mask=inside, other=0).to(tl.float32)
        if HAS_WEIGHTS:
            values *= tl.load(row_weights + row, mask=row < last, other=0).to(tl.float32)[:, None]
        total += values
    tl.store(sums + slot * F + f, tl.sum(total, 0).to(sums.dtype.element_ty), mask=f < F)


def launch_sum_slots(rows: Tensor, row_weights: Tensor | None, slot_ends: Tensor) -> Tensor:
    """Sums [S, F] of rows [N, F], each times its weight if there are weights [N]."""
    (N, F), S = rows.shape, len(slot_ends)
    if row_weights is not None:
        check_shapes(row_weights=(row_weights, (N,)))
        row_weights = row_weights.contiguous()
    sums = rows.new_empty(S, F)
    arguments = (rows.contiguous(), row_weights, slot_ends, sums, F)
    grid = (S, triton.cdiv(F, SUM_SLOTS_BLOCKS["BLOCK_F"]))
    launch(sum_slots_kernel, grid, rows.device, *arguments, HAS_WEIGHTS=row_weights is not None, **SUM_SLOTS_BLOCKS)
    return sums
