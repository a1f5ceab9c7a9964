"""The dispatch plan: from a mask to the indices that move rows, without communication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchPlan:
    """Where the N rows of T tokens go. Rows are sorted by slot, and by token within a slot.

    flat_index [N]: slot · T + token of each row. token_index [N]: token of each row. rows_per_slot [S].
    row_index [N]: rows in the order of tokens; the rows of token t begin at first_row [T] of it (a CSR over tokens).
    """

    flat_index: Tensor
    token_index: Tensor
    rows_per_slot: Tensor
    row_index: Tensor
    first_row: Tensor


def plan_dispatch(mask: Tensor) -> DispatchPlan:
    """The plan of mask [T, S] bool. No sort and no atomics; on a GPU it waits once, for the number of rows."""
    num_tokens, num_slots = mask.shape
    by_slot = mask.T.reshape(-1)
    flat_index = by_slot.nonzero().squeeze(1)
    position = (by_slot.cumsum(0) - 1).view(num_slots, num_tokens)
    # The number of rows is known by now, so this does not wait for the device again.
    by_token = torch.nonzero_static(mask.reshape(-1), size=flat_index.numel()).squeeze(1)
    rows_per_token = mask.sum(1)
    return DispatchPlan(
        flat_index=flat_index,
        token_index=flat_index % max(num_tokens, 1),
        rows_per_slot=mask.sum(0),
        row_index=position.T.reshape(-1).index_select(0, by_token),
        first_row=rows_per_token.cumsum(0) - rows_per_token,
    )


def gather_rows(hidden: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows [N, D] of hidden [T, D], one per chosen (token, slot). Gradients are summed per token in a fixed order."""
    return _GatherRows.apply(hidden, plan)


def sum_rows(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum [T, D] of every token's rows [N, D], zero for a token without rows, accumulated in float32 or wider."""
    return _SumRows.apply(rows, plan)


def row_weights(weights: Tensor, plan: DispatchPlan) -> Tensor:
    """Combine weight [N] of each row, from weights [T, S]."""
    return weights.T.reshape(-1).index_select(0, plan.flat_index)


def _gather(hidden: Tensor, plan: DispatchPlan) -> Tensor:
    return hidden.index_select(0, plan.token_index)


def _segment_sum(rows: Tensor, plan: DispatchPlan) -> Tensor:
    # embedding_bag is the fastest segment sum on CPUs, keeps a float32 accumulator for 16-bit rows and uses no atomics.
    return F.embedding_bag(plan.row_index, rows, plan.first_row, mode="sum")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return _gather(hidden, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _segment_sum(grad.contiguous(), ctx.plan), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return _segment_sum(rows, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad.contiguous(), ctx.plan), None
