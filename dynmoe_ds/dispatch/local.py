"""Dispatch when every slot is on this rank."""

from __future__ import annotations

from torch import Tensor

from dynmoe_ds.dispatch.plan import gather_rows, plan_dispatch, row_weights, sum_rows
from dynmoe_ds.experts import Experts
from dynmoe_ds.routing import Routing


def run_local(hidden: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The experts' weighted outputs [T, D], summed per token, for hidden [T, D]."""
    plan = plan_dispatch(routing.mask)
    outputs = experts(gather_rows(hidden, plan), row_weights(routing.weights, plan), plan.rows_per_slot)
    return sum_rows(outputs, plan)
