"""Layout arithmetic: which rank holds which slots. Pure; knows no process groups."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from dynmoe_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Expert-parallel groups of neighbouring ranks; rank r of a group holds slots [r·S/EP, (r+1)·S/EP)."""

    world_size: int
    rank: int
    ep_size: int

    @property
    def ep_rank(self) -> int:
        """This rank's position in its expert-parallel group."""
        return self.rank % self.ep_size

    def ep_groups(self) -> list[list[int]]:
        """Global ranks of every expert-parallel group."""
        return [list(range(i, i + self.ep_size)) for i in range(0, self.world_size, self.ep_size)]

    def local_slots(self, num_slots: int) -> range:
        """The slots that this rank holds."""
        per_rank = num_slots // self.ep_size
        return range(self.ep_rank * per_rank, (self.ep_rank + 1) * per_rank)


def current_layout(ep_size: int) -> Layout:
    """The layout of this process: from torch.distributed if that is initialised, else from RANK and WORLD_SIZE, else 1.

    Raises: ConfigError if `ep_size` does not divide the ranks.
    """
    if dist.is_initialized():
        world_size, rank = dist.get_world_size(), dist.get_rank()
    else:
        world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if fault := ep_size_fault(ep_size, world_size):
        raise ConfigError(fault)
    return Layout(world_size=world_size, rank=rank, ep_size=ep_size)


def ep_size_fault(ep_size: int, num_ranks: int) -> str | None:
    """What is wrong with an expert-parallel size, as a sentence; None if it fits."""
    if ep_size >= 1 and num_ranks % ep_size == 0:
        return None
    divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
    if num_ranks == 1:
        return (
            f"ep_size is {ep_size} but there is one data-parallel rank. Use 1, or start more ranks with a launcher "
            f"(launch/local.sh, deepspeed or torchrun)."
        )
    choices = f"{', '.join(map(str, divisors[:-1]))} or {divisors[-1]}"
    return f"ep_size is {ep_size} but must divide the {num_ranks} data-parallel ranks. Use {choices}."
