"""Dispatch between the ranks of an expert-parallel group: exactly the chosen rows travel, no capacity, no padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dynmoe_ds.dispatch.plan import gather_rows, plan_dispatch, row_weights, sum_rows
from dynmoe_ds.distributed.all_to_all import exchange, exchange_counts
from dynmoe_ds.experts import Experts
from dynmoe_ds.routing import Routing


def run_all_to_all(hidden: Tensor, routing: Routing, experts: Experts, group: ProcessGroup) -> Tensor:
    """The experts' weighted outputs [T, D], summed per token, for this rank's hidden [T, D].

    Collective: every rank of the expert-parallel group, also with zero tokens: one exchange of counts, then of rows
    and weights to the experts, then of rows back; the backward pass mirrors the last two.
    """
    ep_size = group.size()
    plan = plan_dispatch(routing.mask)
    sent = plan.rows_per_slot.view(ep_size, -1)  # slots are sorted by rank, so rows are sorted by destination
    received = exchange_counts(sent, group)  # [EP, s]: rows from each rank for each of this rank's slots
    # The one wait for the device in a layer besides the number of rows: split sizes must be known to the host.
    sent_splits, received_splits = torch.stack([sent.sum(1), received.sum(1)]).tolist()

    rows, weights = exchange(
        (gather_rows(hidden, plan), row_weights(routing.weights, plan)), sent_splits, received_splits, group
    )
    by_slot, by_source = _orders(received, num_rows=sum(received_splits))
    rows, weights = rows.index_select(0, by_slot), weights.index_select(0, by_slot)
    outputs = experts(rows, weights, received.sum(0)).index_select(0, by_source)
    (outputs,) = exchange((outputs,), received_splits, sent_splits, group)
    return sum_rows(outputs, plan)


def _orders(received: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Row orders [R] that turn (source rank, slot) into (slot, source rank), and back; received [EP, s] counts rows."""
    start_by_source = (received.flatten().cumsum(0) - received.flatten()).view_as(received)
    per_slot = received.T
    start_by_slot = (per_slot.flatten().cumsum(0) - per_slot.flatten()).view_as(per_slot)
    rows = torch.arange(num_rows, device=received.device)
    shift = start_by_source.T - start_by_slot  # [s, EP]
    by_slot = rows + shift.flatten().repeat_interleave(per_slot.flatten(), output_size=num_rows)
    by_source = rows - shift.T.flatten().repeat_interleave(received.flatten(), output_size=num_rows)
    return by_slot, by_source
