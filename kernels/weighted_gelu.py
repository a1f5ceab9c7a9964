"""`gelu(pre + bias) * weight`, the middle of a GELU expert with the combine weight inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import use_triton
from .slot_of_rows import slot_of_rows


def weighted_gelu(pre: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor) -> Tensor:
    """`gelu(pre + bias[slot]) * w` [N, F] for pre [N, F], bias [s, F] and w [N], rows sorted by slot.

    In w's precision, rounded once to pre's. The exact GELU (erf). slot_ends [s] int32: the row after each slot's last,
    which `grouped_mm` calls `offs`.
    """
    if use_triton(pre, bias, row_weights, slot_ends):
        from .jit.weighted_gelu import launch_weighted_gelu

        return launch_weighted_gelu(pre, bias, row_weights, slot_ends)
    return weighted_gelu_torch(pre, bias, row_weights, slot_ends)


def weighted_gelu_backward(
    grad: Tensor, pre: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor, *, with_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of pre [N, F] and w [N] from that of the weighted product [N, F], and on demand the product once more.

    The bias's gradient is `sum_slots` of that of pre.
    """
    if use_triton(grad, pre, bias, row_weights, slot_ends):
        from .jit.weighted_gelu import launch_weighted_gelu_backward

        return launch_weighted_gelu_backward(grad, pre, bias, row_weights, slot_ends, with_product)
    return weighted_gelu_backward_torch(grad, pre, bias, row_weights, slot_ends, with_product=with_product)


def weighted_gelu_torch(pre: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor) -> Tensor:
    """The twin of `weighted_gelu`."""
    inner = F.gelu(_biased(pre, bias, row_weights.dtype, slot_ends))
    return inner.mul_(row_weights[:, None]).to(pre.dtype)


def weighted_gelu_backward_torch(
    grad: Tensor, pre: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor, *, with_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The twin of `weighted_gelu_backward`."""
    dtype, column = pre.dtype, row_weights[:, None]
    biased = _biased(pre, bias, row_weights.dtype, slot_ends)
    product = F.gelu(biased)
    grad_weights = (grad * product).sum(1)
    grad_pre = torch.ops.aten.gelu_backward(grad * column, biased).to(dtype)
    return grad_pre, grad_weights, product.mul_(column).to(dtype) if with_product else None


def _biased(pre: Tensor, bias: Tensor, dtype: torch.dtype, slot_ends: Tensor) -> Tensor:
    per_row = bias if len(bias) == 1 else bias.index_select(0, slot_of_rows(len(pre), slot_ends))
    return pre.to(dtype) + per_row
