"""Products of tokens with gate rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_kernels import can_compute_gate_scores, gate_scores, gate_scores_backward

_FEW_TOKENS = 512
"""Fewer are multiplied sooner by torch, however few bytes the function in C++ would read."""


def gate_logits(hidden: Tensor, rows: Tensor) -> Tensor:
    """`hidden @ rows.T` [T, S] in float32 at least, for hidden [T, D] and rows [S, D]."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = rows.to(dtype)
    if len(hidden) >= _FEW_TOKENS and can_compute_gate_scores(hidden, rows):
        logits: Tensor = _GateLogits.apply(hidden, rows)
        return logits
    return F.linear(hidden.to(dtype), rows)


class _GateLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, rows)
        return gate_scores(hidden, rows, as_cosines=False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, rows = ctx.saved_tensors
        return gate_scores_backward(grad.contiguous(), hidden, rows, None, None)
