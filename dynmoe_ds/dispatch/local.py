"""Dispatch when every slot is on this rank."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe_ds.dispatch.plan import DispatchPlan, RowMoves, plan_dispatch
from dynmoe_ds.experts import Experts
from dynmoe_ds.routing import Routing


def run_local(hidden: Tensor, routing: Routing, experts: Experts, most_rows: int | None = None) -> Tensor:
    """The experts' weighted outputs [T, D], summed per token, for hidden [T, D].

    most_rows: rows to make room for, at least as many as the mask holds; nothing waits for the device then, and every
    tensor has the same size at every call. None: as many as there are, which the host waits for.
    """
    plan = plan_dispatch(routing.mask, most_rows)
    weights = routing.weights.reshape(-1).index_select(0, plan.pair_index)
    if most_rows is not None:
        # Rows that are not there have weights of token 0; what comes back as their gradient is of no meaning.
        is_row = torch.arange(most_rows, device=weights.device) < plan.first_row[-1]
        weights = torch.where(is_row, weights, 0.0)
    return run_slots(hidden, plan, weights, experts)


def run_slots(hidden: Tensor, plan: DispatchPlan, weights: Tensor, experts: Experts) -> Tensor:
    """As `run_local`, for a plan and the weights [N] of its rows."""
    moves = RowMoves(plan)
    return moves.sum(experts(moves.gather(hidden), weights, plan.rows_per_slot))
