"""Training samples that are of no use when it is their turn: counted while the run goes on, named at its end."""

from __future__ import annotations

import logging

import torch.distributed as dist

from dynmoe_ds.data import BrokenSamples
from dynmoe_ds.telemetry import Metric

logger = logging.getLogger(__name__)


def left_out_metrics(left_out: BrokenSamples | None) -> list[Metric]:
    """How many this rank has left out so far; nothing where it is None, because no sample ever is."""
    if left_out is None:
        return []
    return [Metric(name="train/left_out_samples", value=len(left_out), reduction="sum")]


def tell_left_out(left_out: BrokenSamples | None) -> None:
    """Say on rank 0 what all ranks have left out. Collective: every rank, all with None or none of them."""
    if left_out is None:
        return
    of_ranks = [left_out]
    if dist.is_initialized():
        of_ranks = [BrokenSamples() for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, left_out)
    total = BrokenSamples()
    for of_rank in of_ranks:
        total.add_all(of_rank)
    if len(total) and (not dist.is_initialized() or dist.get_rank() == 0):
        logger.warning("%d times a training sample was left out.\n%s", len(total), total.summary())
