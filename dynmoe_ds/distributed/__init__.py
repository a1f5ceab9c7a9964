"""Layout arithmetic, process groups and collectives."""

from dynmoe_ds.distributed.agreement import (
    assert_same_on_all_ranks,
    attempt_together,
    raise_together,
    take_from_first_rank,
)
from dynmoe_ds.distributed.all_to_all import exchange, exchange_counts
from dynmoe_ds.distributed.groups import expert_parallel_group, group_timeout
from dynmoe_ds.distributed.layout import Layout, current_layout, ep_size_fault
from dynmoe_ds.distributed.lost_rank import describe_lost_rank

__all__ = [
    "Layout",
    "assert_same_on_all_ranks",
    "attempt_together",
    "current_layout",
    "describe_lost_rank",
    "ep_size_fault",
    "exchange",
    "exchange_counts",
    "expert_parallel_group",
    "group_timeout",
    "raise_together",
    "take_from_first_rank",
]
