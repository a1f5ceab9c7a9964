"""Expert-parallel process groups for layers that run without an engine."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.distributed as dist

from dynmoe_ds.distributed.layout import current_layout

# A registry per default group: process groups are scarce and every layer of one size shares them.
_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]] = WeakKeyDictionary()


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
            group = dist.new_group(ranks)
            if layout.rank in ranks:
                groups[ep_size] = group
    return groups[ep_size]
