"""`activation(pre + bias) * weight`, the middle of a two-layer expert with the combine weight inside."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import Activation, activate, activate_backward
from .selection import use_triton
from .slot_of_rows import slot_of_rows


def weighted_activation(
    pre: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor, activation: Activation
) -> Tensor:
    """`activation(pre + bias[slot]) * w` [N, F] for pre [N, F], bias [s, F] and w [N], rows sorted by slot.

    In w's precision, rounded once to pre's. slot_ends [s] int32: the row after each slot's last,
    which `grouped_mm` calls `offs`.
    """
    if use_triton(pre, bias, row_weights, slot_ends):
        from .jit.weighted_activation import launch_weighted_activation

        return launch_weighted_activation(pre, bias, row_weights, slot_ends, activation)
    return weighted_activation_torch(pre, bias, row_weights, slot_ends, activation)


def weighted_activation_backward(
    grad: Tensor,
    pre: Tensor,
    bias: Tensor,
    row_weights: Tensor,
    slot_ends: Tensor,
    activation: Activation,
    *,
    with_product: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of pre [N, F] and w [N] from that of the weighted product [N, F], and on demand the product once more.

    The bias's gradient is `sum_slots` of that of pre.
    """
    if use_triton(grad, pre, bias, row_weights, slot_ends):
        from .jit.weighted_activation import launch_weighted_activation_backward

        return launch_weighted_activation_backward(grad, pre, bias, row_weights, slot_ends, activation, with_product)
    arguments = (grad, pre, bias, row_weights, slot_ends, activation)
    return weighted_activation_backward_torch(*arguments, with_product=with_product)


def weighted_activation_torch(
    pre: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor, activation: Activation
) -> Tensor:
    """The twin of `weighted_activation`."""
    inner = activate(_biased(pre, bias, row_weights.dtype, slot_ends), activation)
    return inner.mul_(row_weights[:, None]).to(pre.dtype)


def weighted_activation_backward_torch(
    grad: Tensor,
    pre: Tensor,
    bias: Tensor,
    row_weights: Tensor,
    slot_ends: Tensor,
    activation: Activation,
    *,
    with_product: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The twin of `weighted_activation_backward`."""
    dtype, column = pre.dtype, row_weights[:, None]
    biased = _biased(pre, bias, row_weights.dtype, slot_ends)
    product = activate(biased, activation)
    grad_weights = (grad * product).sum(1)
    grad_pre = activate_backward(grad * column, biased, activation).to(dtype)
    return grad_pre, grad_weights, product.mul_(column).to(dtype) if with_product else None


def _biased(pre: Tensor, bias: Tensor, dtype: torch.dtype, slot_ends: Tensor) -> Tensor:
    per_row = bias if len(bias) == 1 else bias.index_select(0, slot_of_rows(len(pre), slot_ends))
    return pre.to(dtype) + per_row
