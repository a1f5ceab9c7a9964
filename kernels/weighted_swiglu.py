"""`silu(gate) * up * weight`, the middle of a SwiGLU expert with the combine weight inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import use_triton


def weighted_swiglu(gate: Tensor, up: Tensor, row_weights: Tensor) -> Tensor:
    """`silu(gate) * up * w` [N, F] for gate, up [N, F] and w [N], in w's precision, rounded once to gate's.

    With the weight inside, an expert's output need not be stored for the weight's gradient.
    """
    if use_triton(gate, up, row_weights):
        from .jit.weighted_swiglu import launch_weighted_swiglu

        return launch_weighted_swiglu(gate, up, row_weights)
    return weighted_swiglu_torch(gate, up, row_weights)


def weighted_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, row_weights: Tensor, *, with_product: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of gate, up [N, F] and w [N] from that of the weighted product [N, F], and on demand the product.

    The product is cheaper to compute again here than to keep from the forward pass.
    """
    if use_triton(grad, gate, up, row_weights):
        from .jit.weighted_swiglu import launch_weighted_swiglu_backward

        return launch_weighted_swiglu_backward(grad, gate, up, row_weights, with_product)
    return weighted_swiglu_backward_torch(grad, gate, up, row_weights, with_product=with_product)


def weighted_swiglu_torch(gate: Tensor, up: Tensor, row_weights: Tensor) -> Tensor:
    """The twin of `weighted_swiglu`."""
    return F.silu(gate.to(row_weights.dtype)).mul_(up).mul_(row_weights[:, None]).to(gate.dtype)


def weighted_swiglu_backward_torch(
    grad: Tensor, gate: Tensor, up: Tensor, row_weights: Tensor, *, with_product: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The twin of `weighted_swiglu_backward`."""
    dtype, column = gate.dtype, row_weights[:, None]
    wide = gate.to(row_weights.dtype)
    silu, weighted = F.silu(wide), grad * column
    grad_up = (weighted * silu).to(dtype)
    product = silu.mul_(up)
    grad_weights = (grad * product).sum(1)
    grad_gate = torch.ops.aten.silu_backward(weighted.mul_(up), wide).to(dtype)
    return grad_gate, grad_up, grad_weights, product.mul_(column).to(dtype) if with_product else None
