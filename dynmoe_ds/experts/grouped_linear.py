"""One linear map per expert over rows that are sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_ds.experts.host_memory import keep_large_blocks

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STRIDE_BYTES = 16  # grouped_mm wants row strides of whole 16 bytes, on CPU too


def grouped_linear(rows: Tensor, weight: Tensor, rows_per_slot: Tensor) -> Tensor:
    """`rows[i] @ weight[e(i)].T` [R, M] for rows [R, K] sorted by slot and weight [s, M, K].

    rows_per_slot [s] int64 must sum to R. Slots without rows cost nothing and get a gradient of exact zeros, and the
    result stays connected to `rows` and `weight` also when R is 0, so that no rank skips a backward collective.
    `grouped_mm` serves float32, bfloat16 and float16 of aligned sizes; a loop over the slots serves the rest.
    """
    if rows.device.type == "cpu":
        keep_large_blocks()
    if _fits_grouped_mm(weight):
        offsets = rows_per_slot.cumsum(0, dtype=torch.int32)
        return _GroupedLinear.apply(rows, weight, offsets)
    # unbind, not weight[e]: indexing a stacked parameter makes a full-size zero gradient per expert (2.4x slower).
    parts = rows.split(rows_per_slot.tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight.unbind(0), strict=True)])


def _fits_grouped_mm(weight: Tensor) -> bool:
    size = weight.element_size()
    aligned = all(n * size % _STRIDE_BYTES == 0 for n in weight.shape[1:])
    return aligned and weight.dtype in _GROUPED_DTYPES


class _GroupedLinear(torch.autograd.Function):
    """grouped_mm that accepts any gradient layout and saves the parameter itself.

    Under ZeRO-3 a saved transposed view would keep the gathered weight alive until the backward pass; the parameter
    itself is released and gathered again. grouped_mm's own backward refuses gradients that are not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = F.grouped_mm(grad, weight, offs=offsets) if ctx.needs_input_grad[0] else None
        grad_weight = F.grouped_mm(grad.T, rows, offs=offsets) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None
