"""The dispatch plan: from a mask to the indices that move rows; and the moves, which gradients follow back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import dynmoe_kernels
from dynmoe_kernels import PlanIndices as DispatchPlan
from dynmoe_kernels import plan as plan_dispatch

__all__ = ["DispatchPlan", "RowMoves", "chosen", "plan_dispatch"]


def chosen(mask: Tensor, num_rows: int) -> Tensor:
    """Positions [N] of the `num_rows` True values of a flat mask, without a wait for the device."""
    return torch.nonzero_static(mask, size=num_rows).squeeze(1)


class RowMoves:
    """The two moves of one plan: `gather` first, then `sum` of what became of the rows.

    The indices are saved as tensors of the first move's node alone, from where the backward pass of the second takes
    them. So activation checkpointing can drop them, and has three more things right: it computes the layer again before
    the backward pass comes to the experts, whose weights DeepSpeed's form at ZeRO-3 would else release right after they
    were gathered; torch's form stops right after the last chunk's experts, whose rows it does not send back once more.
    """

    def __init__(self, plan: DispatchPlan) -> None:
        self._indices = (plan.token_index, plan.row_index, plan.first_row)
        self._kept = _Kept()

    def gather(self, hidden: Tensor) -> Tensor:
        """Rows [N, D] of hidden [T, D], one per chosen (token, slot). Gradients are summed in a fixed order."""
        return _Gather.apply(hidden, self._kept, *self._indices)

    def sum(self, rows: Tensor) -> Tensor:
        """Sum [T, D] of every token's rows [N, D], 0 for a token without rows, accumulated in float32 or wider."""
        return _Sum.apply(rows, self._kept, *self._indices)


class _Kept:
    """What the two moves know of each other.

    node: that of the first, while the forward pass runs; None if the tokens need no gradient. indices: what the second
    has taken from it in the backward pass, since a checkpoint gives a tensor once.
    """

    def __init__(self) -> None:
        self.node: Any = None
        self.indices: tuple[Tensor, ...] | None = None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, kept: _Kept, *indices: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*indices)
            ctx.kept, kept.node = kept, ctx
        return dynmoe_kernels.gather_rows(hidden.contiguous(), *indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, ctx.kept.indices = ctx.kept.indices or ctx.saved_tensors, None
        return dynmoe_kernels.sum_rows(grad.contiguous(), *indices[1:]), None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, kept: _Kept, *indices: Tensor) -> Tensor:
        # Taken out of `kept`, which that node knows: a cycle would keep the graph alive that no backward pass frees.
        ctx.kept, ctx.node, kept.node = kept, kept.node, None
        if ctx.node is None:
            ctx.save_for_backward(*indices)
        return dynmoe_kernels.sum_rows(rows.contiguous(), *indices[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.node is None:
            indices = ctx.saved_tensors
        else:
            indices = ctx.kept.indices = ctx.node.saved_tensors
        return dynmoe_kernels.gather_rows(grad.contiguous(), *indices), None, None, None, None
