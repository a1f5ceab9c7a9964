"""Layout arithmetic, process groups and collectives."""

from dynmoe_ds.distributed.agreement import (
    assert_same_on_all_ranks,
    attempt_together,
    raise_together,
    take_from_first_rank,
)
from dynmoe_ds.distributed.all_to_all import Flight, Parcel, Splits, exchange_counts
from dynmoe_ds.distributed.groups import expert_parallel_group, group_timeout, node_groups
from dynmoe_ds.distributed.layout import Layout, current_layout, ep_size_fault
from dynmoe_ds.distributed.lost_rank import describe_lost_rank
from dynmoe_ds.distributed.stalls import Cause, StallClock, communication
from dynmoe_ds.distributed.traffic import Traffic

__all__ = [
    "Cause",
    "Flight",
    "Layout",
    "Parcel",
    "Splits",
    "StallClock",
    "Traffic",
    "assert_same_on_all_ranks",
    "attempt_together",
    "communication",
    "current_layout",
    "describe_lost_rank",
    "ep_size_fault",
    "exchange_counts",
    "expert_parallel_group",
    "group_timeout",
    "node_groups",
    "raise_together",
    "take_from_first_rank",
]
