"""Layout arithmetic: which rank holds which slots. Pure; knows no process groups."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from dynmoe_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Expert-parallel groups of neighbouring ranks; rank r of a group holds slots [r·S/EP, (r+1)·S/EP).

    tp_size: neighbouring ranks that hold the same tokens. With tp_size above 1 the ranks at one place in all of their
    groups are a lane, which holds every expert by itself, and groups are of neighbours in their lane: with 4 ranks,
    tp_size 2 and ep_size 2 they are [0, 2] and [1, 3]. DeepSpeed reduces and clips gradients rightly for these alone.
    """

    world_size: int
    rank: int
    ep_size: int
    tp_size: int = 1

    @property
    def ep_rank(self) -> int:
        """This rank's position in its expert-parallel group."""
        return self.rank // self.tp_size % self.ep_size

    def ep_groups(self) -> list[list[int]]:
        """Global ranks of every expert-parallel group."""
        lanes = [list(range(lane, self.world_size, self.tp_size)) for lane in range(self.tp_size)]
        return [lane[i : i + self.ep_size] for lane in lanes for i in range(0, len(lane), self.ep_size)]

    def ep_group(self) -> list[int]:
        """Global ranks of this rank's expert-parallel group."""
        return next(ranks for ranks in self.ep_groups() if self.rank in ranks)

    def expert_data_parallel_group(self) -> list[int]:
        """Global ranks of this one's lane that hold the same slots as it."""
        return list(range(self.rank % (self.tp_size * self.ep_size), self.world_size, self.tp_size * self.ep_size))

    def local_slots(self, num_slots: int) -> range:
        """The slots that this rank holds."""
        per_rank = num_slots // self.ep_size
        return range(self.ep_rank * per_rank, (self.ep_rank + 1) * per_rank)


def current_layout(ep_size: int, tp_size: int = 1) -> Layout:
    """The layout of this process: from torch.distributed if that is initialised, else from RANK and WORLD_SIZE, else 1.

    Raises: ConfigError if `ep_size` does not divide the data-parallel ranks.
    """
    if dist.is_initialized():
        world_size, rank = dist.get_world_size(), dist.get_rank()
    else:
        world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if fault := ep_size_fault(ep_size, world_size // tp_size):
        raise ConfigError(fault)
    return Layout(world_size=world_size, rank=rank, ep_size=ep_size, tp_size=tp_size)


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
