"""Experts of all slots at once: on GPUs, and on CPUs all that is not computed in C++.

Products over all rows, and between them one pass over [R, F].

The combine weight is inside the last product, so the experts' outputs are not kept for its gradient; and what the
activation gave is computed again in the backward pass instead of kept. The parameters are saved themselves: under
ZeRO-3 a saved view would keep the gathered weight alive until the backward pass. With more rows than the slots have,
those at the end are of no slot and undefined, in the output and in the gradients of rows and weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import dynmoe_kernels
from dynmoe_kernels import Activation, multiply_by_slot, multiply_pairs_by_slot


class GatedOfAllSlots(torch.autograd.Function):
    """`w · w2 (activation(w1 x) * (w3 x))` [R, D]; slot_ends [s] int32: the row after each slot's last."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        row_weights: Tensor,
        slot_ends: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        activation: Activation,
    ) -> Tensor:
        gate = multiply_by_slot(rows, w1.transpose(1, 2), slot_ends)
        up = multiply_by_slot(rows, w3.transpose(1, 2), slot_ends)
        ctx.save_for_backward(rows, row_weights, slot_ends, gate, up, w1, w3, w2)
        ctx.activation = activation
        product = dynmoe_kernels.weighted_gated(gate, up, row_weights, activation)
        return multiply_by_slot(product, w2.transpose(1, 2), slot_ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_weights, slot_ends, gate, up, w1, w3, w2 = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_gate, grad_up, grad_weights, product = dynmoe_kernels.weighted_gated_backward(
            multiply_by_slot(grad, w2, slot_ends), gate, up, row_weights, ctx.activation, with_product=wants[5]
        )
        grad_rows = None
        if wants[0]:
            grad_rows = multiply_by_slot(grad_gate, w1, slot_ends).add_(multiply_by_slot(grad_up, w3, slot_ends))
        grad1 = multiply_pairs_by_slot(grad_gate, rows, slot_ends) if wants[3] else None
        grad3 = multiply_pairs_by_slot(grad_up, rows, slot_ends) if wants[4] else None
        grad2 = multiply_pairs_by_slot(grad, product, slot_ends) if product is not None else None
        return grad_rows, grad_weights, None, grad1, grad3, grad2, None


class TwoLayersOfAllSlots(torch.autograd.Function):
    """`w · (w2 activation(w1 x + b1) + b2)` [R, D]; slot_ends [s] int32: the row after each slot's last."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        row_weights: Tensor,
        slot_ends: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        activation: Activation,
    ) -> Tensor:
        pre = multiply_by_slot(rows, w1.transpose(1, 2), slot_ends)
        ctx.save_for_backward(rows, row_weights, slot_ends, pre, w1, b1, w2, b2)
        ctx.activation = activation
        inner = dynmoe_kernels.weighted_activation(pre, b1, row_weights, slot_ends, activation)
        out = multiply_by_slot(inner, w2.transpose(1, 2), slot_ends)
        return dynmoe_kernels.add_weighted_bias(out, b2, row_weights, slot_ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_weights, slot_ends, pre, w1, b1, w2, b2 = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_pre, grad_weights, product = dynmoe_kernels.weighted_activation_backward(
            multiply_by_slot(grad, w2, slot_ends),
            pre,
            b1,
            row_weights,
            slot_ends,
            ctx.activation,
            with_product=wants[5],
        )
        grad_b2, grad_weights_of_bias = dynmoe_kernels.add_weighted_bias_backward(grad, b2, row_weights, slot_ends)
        grad_rows = multiply_by_slot(grad_pre, w1, slot_ends) if wants[0] else None
        grad1 = multiply_pairs_by_slot(grad_pre, rows, slot_ends) if wants[3] else None
        grad_b1 = dynmoe_kernels.sum_slots(grad_pre, slot_ends) if wants[4] else None
        grad2 = multiply_pairs_by_slot(grad, product, slot_ends) if product is not None else None
        return grad_rows, grad_weights + grad_weights_of_bias, None, grad1, grad_b1, grad2, grad_b2, None
