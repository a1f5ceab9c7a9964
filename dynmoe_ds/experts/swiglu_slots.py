"""SwiGLU experts on a CPU in C++: the whole network of one slot after another, several at once on as many threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_kernels import swiglu_slots, swiglu_slots_backward


class SwigluSlots(torch.autograd.Function):
    """`w2 (w silu(w1 x) * (w3 x))` of sorted rows in float32 or bfloat16.

    Beside the inputs it saves gate and up [N, F]; the weighted product is computed again, which is cheaper than storing
    it. Slots without rows cost nothing and get exact zeros as their gradients; rows of no slot are undefined, as in
    `all_slots.py`, which computes the same where `can_compute_swiglu_slots` says no.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, row_weights: Tensor, rows_per_slot: list[int], w1: Tensor, w3: Tensor, w2: Tensor
    ) -> Tensor:
        gate, up = (rows.new_empty(len(rows), w1.shape[1]) for _ in range(2))
        ctx.save_for_backward(rows, row_weights, w1, w3, w2, gate, up)
        ctx.rows_per_slot = rows_per_slot
        return swiglu_slots(rows, row_weights, rows_per_slot, w1, w3, w2, (gate, up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_weights, *others = ctx.saved_tensors
        grad_rows, grad_weights, *of_parameters = swiglu_slots_backward(
            grad.contiguous(), rows, row_weights, ctx.rows_per_slot, *others, wants=ctx.needs_input_grad[3:]
        )
        return grad_rows, grad_weights, None, *of_parameters
