"""Rows of tokens, copied to where their slots expect them: every token is read once and written once per row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import along_a_row, check_shapes, launch, warp_size


@triton.jit
def gather_rows_kernel(hidden, rows, row_index, first_row, D, BLOCK_D: tl.constexpr):
    """hidden [T, D] -> rows [N, D]. Grid: tokens, blocks of columns."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(first_row + t)
    last = tl.load(first_row + t + 1)
    if first < last:
        values = tl.load(hidden + t * D + d, mask=d < D, other=0)
        for entry in range(first, last):
            row = tl.load(row_index + entry)
            tl.store(rows + row * D + d, values, mask=d < D)


def launch_gather_rows(hidden: Tensor, num_rows: int, row_index: Tensor, first_row: Tensor) -> Tensor:
    """Rows [num_rows, D] of hidden [T, D]."""
    T, D = hidden.shape
    check_shapes(row_index=(row_index, (num_rows,)), first_row=(first_row, (T + 1,)))
    rows = hidden.new_empty(num_rows, D)
    block, warps = along_a_row(D, hidden.element_size(), warp_size())
    arguments = (hidden.contiguous(), rows, row_index, first_row, D)
    grid = (T, triton.cdiv(D, block))
    launch(gather_rows_kernel, grid, hidden.device, *arguments, BLOCK_D=block, num_warps=warps)
    return rows
