"""SwiGLU experts on a CPU: the whole network one slot after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_kernels import weighted_swiglu_backward_into, weighted_swiglu_into

_CACHE_LINE_BYTES = 64


class SlotBySlot(torch.autograd.Function):
    """`w2 (w silu(w1 x) * (w3 x))` of sorted rows, a slot at a time, so that its activations are in cache when used.

    Beside the inputs it saves gate and up [N, F]; the weighted product is computed again, which is cheaper than storing
    it. Serves every dtype and size. Slots without rows cost nothing and get exact zeros as their gradients; rows of no
    slot are undefined, as in `all_slots.py`.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, row_weights: Tensor, rows_per_slot: list[int], w1: Tensor, w3: Tensor, w2: Tensor
    ) -> Tensor:
        gate, up = (rows.new_empty(len(rows), w1.shape[1]) for _ in range(2))
        ctx.save_for_backward(rows, row_weights, gate, up, w1, w3, w2)
        ctx.rows_per_slot = rows_per_slot
        return slot_by_slot(rows, row_weights, rows_per_slot, w1, w3, w2, (gate, up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_weights, gate, up, w1, w3, w2 = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(row_weights)
        wants = ctx.needs_input_grad[3:]
        grad1, grad3, grad2 = (
            torch.empty_like(t) if want else None for t, want in zip((w1, w3, w2), wants, strict=True)
        )
        buffers = _for_one_slot(3, rows, ctx.rows_per_slot, gate.shape[1])
        of_rows = _split(ctx.rows_per_slot, rows, row_weights, gate, up, grad, grad_weights, grad_rows)
        slots = zip(of_rows, w1, w3, w2, strict=True)
        for e, ((x, w, a, b, g, gw, gx), w1_e, w3_e, w2_e) in enumerate(slots):
            if len(x) == 0:
                for weight_grad in (grad1, grad3, grad2):
                    if weight_grad is not None:
                        weight_grad[e].zero_()
                continue
            inner, ga, gb = (buffer[: len(x)] for buffer in buffers)
            torch.mm(g, w2_e, out=gb)
            weighted_swiglu_backward_into(gb, ga, gw, inner, a, b, w)
            if grad2 is not None:
                torch.mm(_transposed(g), inner, out=grad2[e])
            if grad1 is not None:
                torch.mm(ga.T, x, out=grad1[e])
            if grad3 is not None:
                torch.mm(gb.T, x, out=grad3[e])
            torch.mm(ga, w1_e, out=gx).addmm_(gb, w3_e)
        return grad_rows, grad_weights, None, grad1, grad3, grad2


def slot_by_slot(
    rows: Tensor,
    row_weights: Tensor,
    rows_per_slot: list[int],
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The outputs [N, D] of `SlotBySlot`. Leaves gate and up in `kept` [N, F] each; None keeps them for one slot only.

    Touches the weights of those slots alone that have rows.
    """
    out = torch.empty_like(rows)
    buffers = _for_one_slot(1 if kept else 3, rows, rows_per_slot, w1.shape[1])
    of_rows = _split(rows_per_slot, rows, row_weights, out, *(kept or ()))
    for (x, w, y, *of_slot), w1_e, w3_e, w2_e in zip(of_rows, w1, w3, w2, strict=True):
        if len(x) > 0:
            product, *own = (buffer[: len(x)] for buffer in buffers)
            a, b = of_slot or own
            torch.mm(x, w1_e.T, out=a)
            torch.mm(x, w3_e.T, out=b)
            weighted_swiglu_into(product, a, b, w)
            torch.mm(product, w2_e.T, out=y)
    return out


def _split(rows_per_slot: list[int], *of_rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each slot's part of every tensor; rows after those of all slots are in none."""
    num_rows = sum(rows_per_slot)
    return zip(*(tensor[:num_rows].split(rows_per_slot) for tensor in of_rows), strict=True)


def _for_one_slot(count: int, like: Tensor, rows_per_slot: list[int], width: int) -> list[Tensor]:
    """Buffers [n, width] for the slot of most rows, of like's dtype.

    Rows are a cache line longer than that: at powers of two, products with a transposed one are 10 to 20 % slower.
    """
    padded = width + _CACHE_LINE_BYTES // like.element_size()
    return [like.new_empty(max(rows_per_slot), padded)[:, :width] for _ in range(count)]


def _transposed(grad: Tensor) -> Tensor:
    # A transposed left operand makes a product in 16 bits slower than the copy that avoids it.
    return grad.T.contiguous() if grad.element_size() == 2 else grad.T
