"""Products of tokens with gate rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_kernels import can_compute_gate_scores, gate_scores, gate_scores_backward

_FEW_TOKENS = 1024
"""Fewer are left to torch. 512 took 0.9 to 1.2 of its time (16 slots, D 512), 2048 took 0.3 to 0.95 (6 to 128 slots,
D 512 to 4096), forward and backward, on 2 threads with AVX-512.
"""


def gate_logits(hidden: Tensor, rows: Tensor) -> Tensor:
    """`hidden @ rows.T` [T, S] in float32 at least, for hidden [T, D] and rows [S, D].

    On CPUs with a compiler, from 1024 tokens on, it has no second derivative; `DYNMOE_KERNELS=torch` gives it back.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = rows.to(dtype)
    if len(hidden) >= _FEW_TOKENS and can_compute_gate_scores(hidden, rows):
        logits: Tensor = _GateLogits.apply(hidden, rows)
        return logits
    return F.linear(hidden.to(dtype), rows)


class _GateLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        # An alias, which keeps the values of a parameter that ZeRO-3 empties after the forward pass.
        ctx.save_for_backward(hidden, rows.detach())
        return gate_scores(hidden, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, rows = ctx.saved_tensors
        return gate_scores_backward(grad, hidden, rows, None, ctx.needs_input_grad)
