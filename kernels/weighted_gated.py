"""`activation(gate) * up * weight`, the middle of a gated expert with the combine weight inside."""

from __future__ import annotations

from torch import Tensor

from .activations import Activation, activate, activate_backward
from .selection import use_triton


def weighted_gated(gate: Tensor, up: Tensor, row_weights: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up * w` [N, F] for gate, up [N, F] and w [N], in w's precision, rounded once to gate's.

    With the weight inside, an expert's output need not be stored for the weight's gradient.
    """
    if use_triton(gate, up, row_weights):
        from .jit.weighted_gated import launch_weighted_gated

        return launch_weighted_gated(gate, up, row_weights, activation)
    return weighted_gated_torch(gate, up, row_weights, activation)


def weighted_gated_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    row_weights: Tensor,
    activation: Activation,
    *,
    with_product: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of gate, up [N, F] and w [N] from that of the weighted product [N, F], and on demand the product.

    The product is cheaper to compute again here than to keep from the forward pass.
    """
    if use_triton(grad, gate, up, row_weights):
        from .jit.weighted_gated import launch_weighted_gated_backward

        return launch_weighted_gated_backward(grad, gate, up, row_weights, activation, with_product)
    return weighted_gated_backward_torch(grad, gate, up, row_weights, activation, with_product=with_product)


def weighted_gated_torch(gate: Tensor, up: Tensor, row_weights: Tensor, activation: Activation) -> Tensor:
    """The twin of `weighted_gated`."""
    product = activate(gate.to(row_weights.dtype), activation).mul_(up).mul_(row_weights[:, None])
    return product.to(gate.dtype)


def weighted_gated_backward_torch(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    row_weights: Tensor,
    activation: Activation,
    *,
    with_product: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The twin of `weighted_gated_backward`."""
    dtype, column = gate.dtype, row_weights[:, None]
    wide = gate.to(row_weights.dtype)
    activated, weighted = activate(wide, activation), grad * column
    grad_up = (weighted * activated).to(dtype)
    product = activated.mul_(up)
    grad_weights = (grad * product).sum(1)
    grad_gate = activate_backward(weighted.mul_(up), wide, activation).to(dtype)
    return grad_gate, grad_up, grad_weights, product.mul_(column).to(dtype) if with_product else None
