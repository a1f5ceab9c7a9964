"""What is wrong with data on one rank, told on all."""

from __future__ import annotations

import torch.distributed as dist

from dynmoe_ds.errors import DataError

MAX_FAULTS_TOLD = 10


def raise_faults_of_all_ranks(faults: list[str]) -> None:
    """Raise the faults that any rank has found on every rank.

    Collective: every rank of the default group. Raises: DataError.
    """
    everyone: list[list[str]] = [faults]
    if dist.is_initialized():
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, faults)
    if found := list(dict.fromkeys(fault for of_rank in everyone for fault in of_rank)):
        more = len(found) - MAX_FAULTS_TOLD
        raise DataError("\n".join(found[:MAX_FAULTS_TOLD] + ([f"And {more} more."] if more > 0 else [])))
