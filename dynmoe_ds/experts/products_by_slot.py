"""Matrix products of rows that are sorted by slot with one matrix per slot. Not differentiable by themselves."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STRIDE_BYTES = 16  # grouped_mm wants row strides of whole 16 bytes, on CPU too


def multiply(rows: Tensor, matrices: Tensor, slot_ends: Tensor) -> Tensor:
    """`rows[i] @ matrices[e(i)]` [R, M] for rows [R, K] sorted by slot and matrices [s, K, M].

    slot_ends [s] int32: the row after each slot's last; the result is undefined in rows after all ends. Slots without
    rows cost nothing. `grouped_mm` serves float32, bfloat16 and float16 of aligned sizes; a loop, which waits for the
    device, serves the rest.
    """
    if _fits_grouped_mm(rows, matrices.shape[1], matrices.shape[2]):
        return F.grouped_mm(rows, matrices, offs=slot_ends)
    out = rows.new_empty(len(rows), matrices.shape[2])
    for matrix, (first, end) in zip(matrices.unbind(0), _ranges(slot_ends), strict=True):
        torch.mm(rows[first:end], matrix, out=out[first:end])
    return out


def multiply_pairs(left: Tensor, right: Tensor, slot_ends: Tensor) -> Tensor:
    """The sum over each slot's rows of `left[i]ᵀ right[i]` [s, M, K] for left [R, M] and right [R, K].

    Exact zeros for a slot without rows; rows after all ends are in no sum.
    """
    if _fits_grouped_mm(left, left.shape[1], right.shape[1]):
        return F.grouped_mm(left.T, right, offs=slot_ends)
    out = left.new_empty(len(slot_ends), left.shape[1], right.shape[1])
    for product, (first, end) in zip(out.unbind(0), _ranges(slot_ends), strict=True):
        torch.mm(left[first:end].T, right[first:end], out=product)  # not `@`, which autocast would change
    return out


def _fits_grouped_mm(like: Tensor, *sizes: int) -> bool:
    aligned = all(size * like.element_size() % _STRIDE_BYTES == 0 for size in sizes)
    return aligned and like.dtype in _GROUPED_DTYPES


def _ranges(slot_ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *slot_ends.tolist()]))
