"""`activation(gate) * up * weight` and its backward pass, each reading every element once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activation
from .activation import activation_share, activation_slope
from .launch import along_a_row, check_shapes, launch, warp_size


@triton.jit
def weighted_gated_kernel(gate, up, row_weights, product, F, ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr):
    """gate, up, product [N, F], row_weights [N]. Grid: rows, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    cells = row * F + f
    a = tl.load(gate + cells, mask=f < F, other=0).to(tl.float32)
    b = tl.load(up + cells, mask=f < F, other=0).to(tl.float32)
    weight = tl.load(row_weights + row).to(tl.float32)
    activated = a * activation_share(a, ACTIVATION)
    tl.store(product + cells, (activated * b * weight).to(product.dtype.element_ty), mask=f < F)


@triton.jit
def weighted_gated_backward_kernel(
    grad,
    gate,
    up,
    row_weights,
    grad_gate,
    grad_up,
    grad_weights,
    product,
    F,
    ACTIVATION: tl.constexpr,
    WITH_PRODUCT: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program per row, which goes along it and so has the whole gradient of the row's weight."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(row_weights + row).to(tl.float32)
    total = tl.zeros((BLOCK_F,), tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        cells = row * F + f
        g = tl.load(grad + cells, mask=f < F, other=0).to(tl.float32)
        a = tl.load(gate + cells, mask=f < F, other=0).to(tl.float32)
        b = tl.load(up + cells, mask=f < F, other=0).to(tl.float32)
        share = activation_share(a, ACTIVATION)
        activated = a * share
        total += g * activated * b
        weighted = g * weight
        slope = activation_slope(a, share, ACTIVATION)
        tl.store(grad_gate + cells, (weighted * b * slope).to(grad_gate.dtype.element_ty), mask=f < F)
        tl.store(grad_up + cells, (weighted * activated).to(grad_up.dtype.element_ty), mask=f < F)
        if WITH_PRODUCT:
            tl.store(product + cells, (activated * b * weight).to(product.dtype.element_ty), mask=f < F)
    tl.store(grad_weights + row, tl.sum(total, 0).to(grad_weights.dtype.element_ty))


def launch_weighted_gated(gate: Tensor, up: Tensor, row_weights: Tensor, activation: Activation) -> Tensor:
    """The weighted product [N, F]."""
    N, F = gate.shape
    check_shapes(up=(up, (N, F)), row_weights=(row_weights, (N,)))
    product = torch.empty((N, F), dtype=gate.dtype, device=gate.device)
    block, warps = along_a_row(F, gate.element_size(), warp_size())
    arguments = (gate.contiguous(), up.contiguous(), row_weights.contiguous(), product, F)
    grid = (N, triton.cdiv(F, block))
    constants = {"ACTIVATION": activation, "BLOCK_F": block, "num_warps": warps}
    launch(weighted_gated_kernel, grid, gate.device, *arguments, **constants)
    return product


def launch_weighted_gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, row_weights: Tensor, activation: Activation, with_product: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of gate, up [N, F] and of the weights [N], and the weighted product [N, F] or None."""
    N, F = gate.shape
    check_shapes(grad=(grad, (N, F)), up=(up, (N, F)), row_weights=(row_weights, (N,)))
    grad_gate, grad_up = (torch.empty((N, F), dtype=t.dtype, device=t.device) for t in (gate, up))
    product = torch.empty_like(grad_gate) if with_product else None
    grad_weights = torch.empty((N,), dtype=row_weights.dtype, device=gate.device)
    block, warps = along_a_row(F, gate.element_size(), warp_size())
    launch(
        weighted_gated_backward_kernel,
        (N,),
        gate.device,
        grad.contiguous(),
        gate.contiguous(),
        up.contiguous(),
        row_weights.contiguous(),
        grad_gate,
        grad_up,
        grad_weights,
        product,
        F,
        ACTIVATION=activation,
        WITH_PRODUCT=with_product,
        BLOCK_F=block,
        num_warps=warps,
    )
    return grad_gate, grad_up, grad_weights, product
