"""`rows + weight * bias`, the end of an expert whose last map has a bias and whose combine weight is inside."""

from __future__ import annotations

from torch import Tensor

from .selection import use_triton
from .slot_of_rows import slot_of_rows
from .sum_slots import sum_slots_torch


def add_weighted_bias(rows: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor) -> Tensor:
    """`rows + w * bias[slot]` [N, D] for rows [N, D] sorted by slot, bias [s, D] and w [N].

    Rounded once to rows' dtype. slot_ends [s] int32: the row after each slot's last.
    """
    if use_triton(rows, bias, row_weights, slot_ends):
        from .jit.weighted_bias import launch_add_weighted_bias

        return launch_add_weighted_bias(rows, bias, row_weights, slot_ends)
    return add_weighted_bias_torch(rows, bias, row_weights, slot_ends)


def add_weighted_bias_backward(
    grad: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of bias [s, D] and w [N] from that of the sum [N, D], which is also the gradient of the rows."""
    if use_triton(grad, bias, row_weights, slot_ends):
        from .jit.sum_slots import launch_sum_slots
        from .jit.weighted_bias import launch_weighted_bias_grad_weights

        return launch_sum_slots(grad, row_weights, slot_ends), launch_weighted_bias_grad_weights(
            grad, bias, row_weights, slot_ends
        )
    return add_weighted_bias_backward_torch(grad, bias, row_weights, slot_ends)


def add_weighted_bias_torch(rows: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor) -> Tensor:
    """The twin of `add_weighted_bias`."""
    per_row = bias if len(bias) == 1 else bias.index_select(0, slot_of_rows(len(rows), slot_ends))
    return (per_row * row_weights[:, None]).add_(rows).to(rows.dtype)


def add_weighted_bias_backward_torch(
    grad: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor
) -> tuple[Tensor, Tensor]:
    """The twin of `add_weighted_bias_backward`."""
    grad_bias = sum_slots_torch(grad * row_weights[:, None], slot_ends).to(bias.dtype)
    per_row = bias if len(bias) == 1 else bias.index_select(0, slot_of_rows(len(grad), slot_ends))
    return grad_bias, (grad.to(row_weights.dtype) * per_row).sum(1)
