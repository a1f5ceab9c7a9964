"""`rows + weight * bias`, and the gradient of the weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import along_a_row, check_shapes, launch, warp_size
from .slot import slot_block, slot_of_row


@triton.jit
def add_weighted_bias_kernel(
    rows, bias, row_weights, slot_ends, sums, D, S, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """rows, sums [N, D], bias [S, D], row_weights [N], slot_ends [S]. Grid: rows, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = slot_of_row(row, slot_ends, S, BLOCK_S)
    values = tl.load(rows + row * D + d, mask=d < D, other=0).to(tl.float32)
    weight = tl.load(row_weights + row).to(tl.float32)
    values += weight * tl.load(bias + slot * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(sums + row * D + d, values.to(sums.dtype.element_ty), mask=d < D)


@triton.jit
def weighted_bias_grad_weights_kernel(
    grad, bias, slot_ends, grad_weights, D, S, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Product of every row of grad [N, D] with the bias of its slot: grad_weights [N]. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    slot = slot_of_row(row, slot_ends, S, BLOCK_S)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(grad + row * D + d, mask=d < D, other=0).to(tl.float32)
        total += g * tl.load(bias + slot * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(grad_weights + row, tl.sum(total, 0).to(grad_weights.dtype.element_ty))


def launch_add_weighted_bias(rows: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor) -> Tensor:
    """`rows + w * bias[slot]` [N, D]."""
    (N, D), S = rows.shape, len(slot_ends)
    check_shapes(bias=(bias, (S, D)), row_weights=(row_weights, (N,)))
    sums = torch.empty((N, D), dtype=rows.dtype, device=rows.device)
    block, warps = along_a_row(D, rows.element_size(), warp_size())
    arguments = (rows.contiguous(), bias.contiguous(), row_weights.contiguous(), slot_ends, sums, D, S)
    blocks = {"BLOCK_S": slot_block(S), "BLOCK_D": block}
    launch(add_weighted_bias_kernel, (N, triton.cdiv(D, block)), rows.device, *arguments, **blocks, num_warps=warps)
    return sums


def launch_weighted_bias_grad_weights(grad: Tensor, bias: Tensor, row_weights: Tensor, slot_ends: Tensor) -> Tensor:
    """The gradient of row_weights [N]."""
    (N, D), S = grad.shape, len(slot_ends)
    check_shapes(bias=(bias, (S, D)), row_weights=(row_weights, (N,)))
    grad_weights = torch.empty((N,), dtype=row_weights.dtype, device=grad.device)
    block, warps = along_a_row(D, grad.element_size(), warp_size())
    arguments = (grad.contiguous(), bias.contiguous(), slot_ends, grad_weights, D, S)
    blocks = {"BLOCK_S": slot_block(S), "BLOCK_D": block}
    launch(weighted_bias_grad_weights_kernel, (N,), grad.device, *arguments, **blocks, num_warps=warps)
    return grad_weights
