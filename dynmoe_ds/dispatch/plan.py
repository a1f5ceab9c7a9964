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

    token_index [N]: token of each row. rows_per_slot [S]. entry_index [N]: position of each row in the order of tokens
    (by token, and by slot within one), which is the order of `chosen_weights`. row_index [N]: its inverse, so that the
    rows of token t begin at first_row [T] of it (a CSR over tokens).
    """

    token_index: Tensor
    rows_per_slot: Tensor
    entry_index: Tensor
    row_index: Tensor
    first_row: Tensor


def plan_dispatch(mask: Tensor, num_rows: int | None = None) -> DispatchPlan:
    """The plan of mask [T, S] bool with `num_rows` entries, which only the device knows if None: then it waits for it.

    No sort and no atomics.
    """
    num_tokens, num_slots = mask.shape
    if num_rows is None:
        num_rows = int(mask.sum())
    by_slot, by_token = mask.T.reshape(-1), mask.reshape(-1)
    flat_index = chosen(by_slot, num_rows)
    position = (by_slot.cumsum(0) - 1).view(num_slots, num_tokens)
    row_index = position.T.reshape(-1).index_select(0, chosen(by_token, num_rows))
    entry_index = torch.empty_like(row_index)
    entry_index[row_index] = torch.arange(num_rows, device=mask.device)
    rows_per_token = mask.sum(1)
    return DispatchPlan(
        token_index=flat_index % max(num_tokens, 1),
        rows_per_slot=mask.sum(0),
        entry_index=entry_index,
        row_index=row_index,
        first_row=rows_per_token.cumsum(0) - rows_per_token,
    )


def chosen(mask: Tensor, num_rows: int) -> Tensor:
    """Positions [N] of the `num_rows` True values of a flat mask, without a wait for the device."""
    return torch.nonzero_static(mask, size=num_rows).squeeze(1)


def chosen_weights(weights: Tensor, mask: Tensor, num_rows: int) -> Tensor:
    """The weights [N] of the `num_rows` chosen pairs in weights [T, S], by token and by slot within one."""
    return weights.reshape(-1).index_select(0, chosen(mask.reshape(-1), num_rows))


def gather_rows(hidden: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows [N, D] of hidden [T, D], one per chosen (token, slot). Gradients are summed per token in a fixed order."""
    return _GatherRows.apply(hidden, plan)


def sum_rows(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum [T, D] of every token's rows [N, D], zero for a token without rows, accumulated in float32 or wider."""
    return _SumRows.apply(rows, plan)


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
