"""`activation(pre + bias) * weight` and its backward pass, each reading every element once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import Activation
from .activation import activation_share, activation_slope
from .launch import along_a_row, check_shapes, launch, warp_size
from .slot import slot_block, slot_of_row


@triton.jit
def weighted_activation_kernel(
    pre,
    bias,
    row_weights,
    slot_ends,
    product,
    F,
    S,
    ACTIVATION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """pre, product [N, F], bias [S, F], row_weights [N], slot_ends [S]. Grid: rows, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    slot = slot_of_row(row, slot_ends, S, BLOCK_S)
    x = tl.load(pre + row * F + f, mask=f < F, other=0).to(tl.float32)
    x += tl.load(bias + slot * F + f, mask=f < F, other=0).to(tl.float32)
    share = activation_share(x, ACTIVATION)
    weight = tl.load(row_weights + row).to(tl.float32)
    tl.store(product + row * F + f, (x * share * weight).to(product.dtype.element_ty), mask=f < F)


@triton.jit
def weighted_activation_backward_kernel(
    grad,
    pre,
    bias,
    row_weights,
    slot_ends,
    grad_pre,
    grad_weights,
    product,
    F,
    S,
    ACTIVATION: tl.constexpr,
    WITH_PRODUCT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program per row, which goes along it and so has the whole gradient of the row's weight."""
    row = tl.program_id(0).to(tl.int64)
    slot = slot_of_row(row, slot_ends, S, BLOCK_S)
    weight = tl.load(row_weights + row).to(tl.float32)
    total = tl.zeros((BLOCK_F,), tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        g = tl.load(grad + row * F + f, mask=f < F, other=0).to(tl.float32)
        x = tl.load(pre + row * F + f, mask=f < F, other=0).to(tl.float32)
        x += tl.load(bias + slot * F + f, mask=f < F, other=0).to(tl.float32)
        share = activation_share(x, ACTIVATION)
        slope = activation_slope(x, share, ACTIVATION)
        total += g * x * share
        tl.store(grad_pre + row * F + f, (g * weight * slope).to(grad_pre.dtype.element_ty), mask=f < F)
        if WITH_PRODUCT:
            tl.store(product + row * F + f, (x * share * weight).to(product.dtype.element_ty), mask=f < F)
    tl.store(grad_weights + row, tl.sum(total, 0).to(grad_weights.dtype.element_ty))


def launch_weighted_activation(
    pre: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor, activation: Activation
) -> Tensor:
    """The weighted product [N, F]."""
    (N, F), S = pre.shape, len(slot_ends)
    check_shapes(bias=(bias, (S, F)), row_weights=(row_weights, (N,)))
    product = torch.empty((N, F), dtype=pre.dtype, device=pre.device)
    block, warps = along_a_row(F, pre.element_size(), warp_size())
    arguments = (pre.contiguous(), bias.contiguous(), row_weights.contiguous(), slot_ends, product, F, S)
    blocks = {"ACTIVATION": activation, "BLOCK_S": slot_block(S), "BLOCK_F": block}
    launch(weighted_activation_kernel, (N, triton.cdiv(F, block)), pre.device, *arguments, **blocks, num_warps=warps)
    return product


def launch_weighted_activation_backward(
    grad: Tensor,
    pre: Tensor,
    bias: Tensor,
    row_weights: Tensor,
    slot_ends: Tensor,
    activation: Activation,
    with_product: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of pre [N, F] and of the weights [N], and the weighted product [N, F] or None."""
    (N, F), S = pre.shape, len(slot_ends)
    check_shapes(grad=(grad, (N, F)), bias=(bias, (S, F)), row_weights=(row_weights, (N,)))
    grad_pre = torch.empty((N, F), dtype=pre.dtype, device=pre.device)
    product = torch.empty_like(grad_pre) if with_product else None
    grad_weights = torch.empty((N,), dtype=row_weights.dtype, device=pre.device)
    block, warps = along_a_row(F, pre.element_size(), warp_size())
    launch(
        weighted_activation_backward_kernel,
        (N,),
        pre.device,
        grad.contiguous(),
        pre.contiguous(),
        bias.contiguous(),
        row_weights.contiguous(),
        slot_ends,
        grad_pre,
        grad_weights,
        product,
        F,
        S,
        ACTIVATION=activation,
        WITH_PRODUCT=with_product,
        BLOCK_S=slot_block(S),
        BLOCK_F=block,
        num_warps=warps,
    )
    return grad_pre, grad_weights, product
