"""`silu(gate) * up * weight` into given tensors, for CPUs: a slot at a time, the same buffers serve all slots."""

from __future__ import annotations

from torch import Tensor

from .cpu.weighted_swiglu import use_cpp, weighted_swiglu_backward_cpp, weighted_swiglu_cpp
from .weighted_gated import weighted_gated_backward_torch, weighted_gated_torch


def weighted_swiglu_into(product: Tensor, gate: Tensor, up: Tensor, row_weights: Tensor) -> None:
    """`silu(gate) * up * w` [n, F] into `product`, in w's precision, rounded once; on a CPU.

    gate, up, product [n, F], whose rows may be parts of longer ones; w [n].
    """
    if use_cpp(row_weights, product, gate, up):
        weighted_swiglu_cpp(gate, up, row_weights, product)
    else:
        product.copy_(weighted_gated_torch(gate, up, row_weights, "silu"))


def weighted_swiglu_backward_into(
    grad_up: Tensor,
    grad_gate: Tensor,
    grad_weights: Tensor,
    product: Tensor,
    gate: Tensor,
    up: Tensor,
    row_weights: Tensor,
) -> None:
    """Gradients of up, gate [n, F] and w [n], and the weighted product once more, into the first four tensors.

    On entry `grad_up` holds the gradient of the weighted product. Otherwise as `weighted_swiglu_into`.
    """
    if use_cpp(row_weights, grad_up, grad_gate, product, gate, up):
        weighted_swiglu_backward_cpp(grad_up, gate, up, row_weights, grad_gate, grad_up, grad_weights, product)
        return
    found = weighted_gated_backward_torch(grad_up, gate, up, row_weights, "silu", with_product=True)
    for place, values in zip((grad_gate, grad_up, grad_weights, product), found, strict=True):
        assert values is not None
        place.copy_(values)
