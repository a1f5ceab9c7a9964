"""Dispatch when every slot is on this rank."""

from __future__ import annotations

from torch import Tensor

from dynmoe_ds.dispatch.plan import chosen_weights, gather_rows, plan_dispatch, sum_rows
from dynmoe_ds.experts import Experts
from dynmoe_ds.routing import Routing


def run_local(hidden: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The experts' weighted outputs [T, D], summed per token, for hidden [T, D]. On a GPU it waits once, for N."""
    num_rows = int(routing.mask.sum())
    weights = chosen_weights(routing.weights, routing.mask, num_rows)
    return run_slots(hidden, routing.mask, weights, num_rows, experts)


def run_slots(hidden: Tensor, mask: Tensor, weights: Tensor, num_rows: int, experts: Experts) -> Tensor:
    """As `run_local`, for mask [T, s] with `num_rows` entries, and their weights [N] as `chosen_weights` gives them."""
    plan = plan_dispatch(mask, num_rows)
    outputs = experts(gather_rows(hidden, plan), weights.index_select(0, plan.entry_index), plan.rows_per_slot)
    return sum_rows(outputs, plan)
