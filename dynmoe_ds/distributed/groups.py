"""Process groups of this package's own, and how long a rank waits for another one in them."""

from __future__ import annotations

from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist

from dynmoe_ds.distributed.layout import current_layout

# A registry per default group: process groups are scarce and every layer of one size shares them.
_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]] = WeakKeyDictionary()


def group_timeout() -> timedelta:
    """How long a rank waits for another one in a collective of the default group; for all groups that are made later.

    `torch.distributed.new_group` does not take it over: unless told, it waits 30 minutes on gloo and 10 on NCCL.
    """
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    # No public name gives it back. Every device type of a group waits equally long.
    timeout: timedelta = world._get_backend(world._device_types[0]).options._timeout
    return timeout


def expert_parallel_group(ep_size: int) -> dist.ProcessGroup:
    """This rank's group of `ep_size` neighbouring ranks.

    Collective: every rank, at the first call for a size. Raises: ConfigError if `ep_size` does not divide the ranks.
    """
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    groups = _GROUPS.setdefault(world, {})
    if ep_size not in groups:
        layout = current_layout(ep_size)
        for ranks in layout.ep_groups():
            group = dist.new_group(ranks, timeout=group_timeout())
            if layout.rank in ranks:
                groups[ep_size] = group
    return groups[ep_size]
