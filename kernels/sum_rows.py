"""The sum of every token's rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .selection import use_triton


def sum_rows(rows: Tensor, row_index: Tensor, first_row: Tensor) -> Tensor:
    """Sums [T, D] of the rows of each token, for rows [N, D], row_index [N] and first_row [T + 1] of a plan.

    Zero for a token without rows. Accumulated in float32 (float64 for float64) in the order of the slots, without
    atomics, and rounded once: the same bits every time. Its transpose is `gather_rows`.
    """
    if use_triton(rows, row_index, first_row):
        from .jit.sum_rows import launch_sum_rows

        return launch_sum_rows(rows, row_index, first_row)
    return sum_rows_torch(rows, row_index, first_row)


def sum_rows_torch(rows: Tensor, row_index: Tensor, first_row: Tensor) -> Tensor:
    """The twin of `sum_rows`."""
    # embedding_bag is the fastest segment sum on CPUs, keeps a float32 accumulator for 16-bit rows and uses no atomics.
    # One bag more takes the rows of no token: with `include_last_offset`, torch 2.13 adds them to the last token's.
    return F.embedding_bag(row_index, rows.contiguous(), first_row, mode="sum")[:-1]
