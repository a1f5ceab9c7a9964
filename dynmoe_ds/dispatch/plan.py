"""The dispatch plan: from a mask to the indices that move rows, and the moves, which gradients follow back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_kernels import PlanIndices as DispatchPlan
from dynmoe_kernels import gather_rows as gather_rows_of
from dynmoe_kernels import plan as plan_dispatch
from dynmoe_kernels import sum_rows as sum_rows_of

__all__ = ["DispatchPlan", "chosen", "gather_rows", "plan_dispatch", "sum_rows"]


def chosen(mask: Tensor, num_rows: int) -> Tensor:
    """Positions [N] of the `num_rows` True values of a flat mask, without a wait for the device."""
    return torch.nonzero_static(mask, size=num_rows).squeeze(1)


def gather_rows(hidden: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows [N, D] of hidden [T, D], one per chosen (token, slot). Gradients are summed per token in a fixed order."""
    return _GatherRows.apply(hidden, plan.token_index, plan.row_index, plan.first_row)


def sum_rows(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum [T, D] of every token's rows [N, D], zero for a token without rows, accumulated in float32 or wider."""
    return _SumRows.apply(rows, plan.token_index, plan.row_index, plan.first_row)


# The indices are saved as tensors, so that activation checkpointing drops them, too. It computes the layer again when
# the backward pass asks for the first of them, before that of the experts: at ZeRO-3, DeepSpeed's checkpointing would
# else release the weights that the experts' backward pass has just gathered (tests/engine/test_schedule.py).
class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, token_index: Tensor, row_index: Tensor, first_row: Tensor) -> Tensor:
        ctx.save_for_backward(row_index, first_row)
        return gather_rows_of(hidden.contiguous(), token_index, row_index, first_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return sum_rows_of(grad.contiguous(), *ctx.saved_tensors), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_index: Tensor, row_index: Tensor, first_row: Tensor) -> Tensor:
        ctx.save_for_backward(token_index, row_index, first_row)
        return sum_rows_of(rows.contiguous(), row_index, first_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_rows_of(grad.contiguous(), *ctx.saved_tensors), None, None, None
