"""Rows of tokens, copied to where their slots expect them."""

from __future__ import annotations

from torch import Tensor

from .selection import use_triton


def gather_rows(hidden: Tensor, token_index: Tensor, row_index: Tensor, first_row: Tensor) -> Tensor:
    """Rows [N, D], `rows[i] = hidden[token_index[i]]`, for hidden [T, D] and a plan's indices.

    The kernel goes through the tokens, so that each is read once however many rows it has. What it leaves in rows that
    belong to no token (more were allocated than the mask holds) is not defined; the twin copies token 0 there.
    Its transpose is `sum_rows`.
    """
    if use_triton(hidden, token_index, row_index, first_row):
        from .jit.gather_rows import launch_gather_rows

        return launch_gather_rows(hidden, len(token_index), row_index, first_row)
    return gather_rows_torch(hidden, token_index, row_index, first_row)


def gather_rows_torch(hidden: Tensor, token_index: Tensor, row_index: Tensor, first_row: Tensor) -> Tensor:
    """The twin of `gather_rows`. Without any token the rows, which then belong to none, are zero."""
    if not len(hidden):
        return hidden.new_zeros(len(token_index), hidden.shape[1])
    return hidden.index_select(0, token_index)
