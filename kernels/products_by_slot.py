"""Matrix products of rows that are sorted by slot with one matrix per slot.

Torch's `grouped_mm` is the faster one where it has a kernel: on a CPU, and for bfloat16 on NVIDIA's GPUs of compute
capability 9 and 10. On other GPUs, and there for other dtypes, it waits for the device and then loops over the slots
(torch 2.13, `_grouped_mm_fallback`); a Triton kernel that does neither takes its place.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import chosen_kernels, use_triton

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16  # what grouped_mm wants of strides, on CPU too, and on GPUs of addresses
_FEWEST_SLOTS_TOO_MANY = 1024  # for the kernel that grouped_mm has on GPUs


def multiply_by_slot(rows: Tensor, matrices: Tensor, slot_ends: Tensor) -> Tensor:
    """`rows[i] @ matrices[e(i)]` [R, M] for rows [R, K] sorted by slot and matrices [s, K, M].

    slot_ends [s] int32: the row after each slot's last, R at most; the result is undefined in rows after all ends.
    Slots without rows cost nothing. Accumulated in float32 (float64 for float64); float32 is multiplied as TF32 where
    `torch.backends.cuda.matmul` allows it.
    """
    if _take_triton(rows, matrices, slot_ends):
        from .jit.products_by_slot import launch_multiply_by_slot

        return launch_multiply_by_slot(rows, matrices, slot_ends)
    return multiply_by_slot_torch(rows, matrices, slot_ends)


def multiply_pairs_by_slot(left: Tensor, right: Tensor, slot_ends: Tensor) -> Tensor:
    """The sum over each slot's rows of `left[i]ᵀ right[i]` [s, M, K] for left [R, M] and right [R, K].

    Exact zeros for a slot without rows; rows after all ends are in no sum. Otherwise as `multiply_by_slot`, of which it
    is the gradient for the matrices.
    """
    if _take_triton(left, right, slot_ends):
        from .jit.products_by_slot import launch_multiply_pairs_by_slot

        return launch_multiply_pairs_by_slot(left, right, slot_ends)
    return multiply_pairs_by_slot_torch(left, right, slot_ends)


def multiply_by_slot_torch(rows: Tensor, matrices: Tensor, slot_ends: Tensor) -> Tensor:
    """The twin of `multiply_by_slot`: `grouped_mm` if it takes these tensors, else a loop."""
    if _fits_grouped_mm(rows, matrices, matrices.shape[2]):
        return F.grouped_mm(rows, matrices, offs=slot_ends)
    out = rows.new_empty(len(rows), matrices.shape[2])
    for matrix, (first, end) in zip(matrices.unbind(0), _ranges(slot_ends), strict=True):
        torch.mm(rows[first:end], matrix, out=out[first:end])
    return out


def multiply_pairs_by_slot_torch(left: Tensor, right: Tensor, slot_ends: Tensor) -> Tensor:
    """The twin of `multiply_pairs_by_slot`."""
    if _fits_grouped_mm(left, right, right.shape[1]):
        return F.grouped_mm(left.T, right, offs=slot_ends)
    out = left.new_empty(len(slot_ends), left.shape[1], right.shape[1])
    for product, (first, end) in zip(out.unbind(0), _ranges(slot_ends), strict=True):
        torch.mm(left[first:end].T, right[first:end], out=product)  # not `@`, which autocast would change
    return out


def _take_triton(left: Tensor, right: Tensor, slot_ends: Tensor) -> bool:
    """Whether the Triton kernel computes: where it was chosen, or the choice is free and `grouped_mm` would wait."""
    if chosen_kernels() == "auto" and left.device.type == "cuda" and _is_grouped_mm_fast(left, right, slot_ends):
        return False
    return use_triton(left, right, slot_ends)


def _is_grouped_mm_fast(left: Tensor, right: Tensor, slot_ends: Tensor) -> bool:
    """Whether `grouped_mm` has a kernel of its own for these tensors on a GPU.

    Source: torch 2.13, aten/src/ATen/native/cuda, GroupedBlas.cpp and GroupMM.cu. Without rows nothing is known of it.
    """
    return (
        left.dtype == torch.bfloat16
        and _has_grouped_kernel(left.device.index)
        and len(slot_ends) < _FEWEST_SLOTS_TOO_MANY
        and len(left) > 0
        and _fits_grouped_mm(left, right, right.shape[-1])
    )


@cache
def _has_grouped_kernel(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] in (9, 10)


def _fits_grouped_mm(left: Tensor, right: Tensor, num_columns: int) -> bool:
    """Whether `grouped_mm` takes these operands, for a result of so many columns."""
    if left.dtype not in _GROUPED_DTYPES or num_columns * left.element_size() % _ALIGNMENT_BYTES:
        return False
    return _is_aligned(left) and _is_aligned(right)


def _is_aligned(operand: Tensor) -> bool:
    """Whether the last two dimensions are stored by rows or by columns, whose beginnings are aligned."""
    strides = operand.stride()[-2:]
    if min(strides) != 1 or max(strides) * operand.element_size() % _ALIGNMENT_BYTES:
        return False
    return operand.device.type == "cpu" or operand.data_ptr() % _ALIGNMENT_BYTES == 0


def _ranges(slot_ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *slot_ends.tolist()]))
