"""Process groups of this package's own, and how long a rank waits for another one in them."""

from __future__ import annotations

from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist

from dynmoe_ds.distributed.layout import current_layout

# A registry per default group: process groups are scarce and every layer of one size shares them.
_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, int, int, int], dist.ProcessGroup]] = WeakKeyDictionary()


def group_timeout() -> timedelta:
    """How long a rank waits for another one in a collective of the default group; for all groups that are made later.

    `torch.distributed.new_group` does not take it over: unless told, it waits 30 minutes on gloo and 10 on NCCL.
    """
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    # No public name gives it back. Every device type of a group waits equally long.
    timeout: timedelta = world._get_backend(world._device_types[0]).options._timeout
    return timeout


def expert_parallel_group(ep_size: int, tp_size: int = 1) -> dist.ProcessGroup:
    """This rank's group of `ep_size` ranks, as `Layout` says.

    Collective: every rank, at the first call for a size. Raises: ConfigError if `ep_size` does not divide the ranks.
    """
    layout = current_layout(ep_size, tp_size)
    return _group_of_this_rank(("expert-parallel", ep_size, ep_size, tp_size), layout.ep_groups())


def node_groups(ep_size: int, ranks_per_node: int, tp_size: int = 1) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's expert-parallel group once more, as one between nodes and one within this node.

    The first has the ranks of the group that hold this one's position in their nodes, by node; the second those of its
    node. ranks_per_node: of the group; divides `ep_size`. Collective: every rank, at the first call for the sizes.
    """
    layout = current_layout(ep_size, tp_size)
    between = [ranks[i::ranks_per_node] for ranks in layout.ep_groups() for i in range(ranks_per_node)]
    within = [ranks[i : i + ranks_per_node] for ranks in layout.ep_groups() for i in range(0, ep_size, ranks_per_node)]
    sizes = (ep_size, ranks_per_node, tp_size)
    return _group_of_this_rank(("between nodes", *sizes), between), _group_of_this_rank(("in a node", *sizes), within)


def _group_of_this_rank(key: tuple[str, int, int, int], groups: list[list[int]]) -> dist.ProcessGroup:
    """This rank's one of the groups, which are made at the first call for a key, by every rank."""
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    made = _GROUPS.setdefault(world, {})
    if key not in made:
        for ranks in groups:
            group = dist.new_group(ranks, timeout=group_timeout())
            if dist.get_rank() in ranks:
                made[key] = group
    return made[key]
