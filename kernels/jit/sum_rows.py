"""The sum of every token's rows: a segment sum over a CSR, in float32, in a fixed order, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import along_a_row, check_shapes, launch, warp_size


@triton.jit
def sum_rows_kernel(rows, sums, row_index, first_row, D, BLOCK_D: tl.constexpr):
    """rows [N, D] -> sums [T, D]. Grid: tokens, blocks of columns."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(first_row + t)
    last = tl.load(first_row + t + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for entry in range(first, last):
        row = tl.load(row_index + entry)
        total += tl.load(rows + row * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(sums + t * D + d, total.to(sums.dtype.element_ty), mask=d < D)


def launch_sum_rows(rows: Tensor, row_index: Tensor, first_row: Tensor) -> Tensor:
    """Sums [T, D] of rows [N, D]."""
    (N, D), T = rows.shape, len(first_row) - 1
    check_shapes(row_index=(row_index, (N,)))
    sums = rows.new_empty(T, D)
    block, warps = along_a_row(D, rows.element_size(), warp_size())
    arguments = (rows.contiguous(), sums, row_index, first_row, D)
    grid = (T, triton.cdiv(D, block))
    launch(sum_rows_kernel, grid, rows.device, *arguments, BLOCK_D=block, num_warps=warps)
    return sums
