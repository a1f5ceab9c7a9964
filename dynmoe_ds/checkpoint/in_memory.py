"""A snapshot that is read again without being written: for an engine that is rebuilt inside its process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe_ds.checkpoint.store import Snapshot


class SnapshotInMemory:
    """What a checkpoint of the same snapshot would give, from the parts that the ranks hold.

    Every rank of `group`, which must work on host memory, has one. Collective: construction, by all of them.
    """

    path = Path("the engine")
    """What error messages call it."""

    def __init__(self, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
        self._snapshot = snapshot
        self.manifest: dict[str, Any] = snapshot.described | {"step": snapshot.step}
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, list(snapshot.tensors), group=group)
        self._holder = {name: rank for rank, held in enumerate(names) for name in held}

    def check_names(self, expected: Mapping[str, torch.Size]) -> None:
        """They are the engine's own."""

    def read_tensors(self, wanted: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
        """Fill tensors on the host by name. Each name is asked for once, by all who want it: then it is forgotten.

        Collective: every rank of `group`.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        asked: list[list[str]] = [[] for _ in range(world_size)]
        for name in wanted:
            asked[self._holder[name]].append(name)
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, asked, group=group)
        sent = [[_bytes(self._snapshot.tensors[name]) for name in of_rank[rank]] for of_rank in everyone]
        received = [[_bytes(wanted[name]) for name in names] for names in asked]
        incoming = torch.empty(sum(map(_size, received)), dtype=torch.uint8)
        if world_size == 1:
            incoming = _joined(sent)
        else:
            dist.all_to_all_single(
                incoming, _joined(sent), [_size(p) for p in received], [_size(p) for p in sent], group=group
            )
        at = 0
        for part in (part for parts in received for part in parts):
            part.copy_(incoming[at : at + part.numel()])
            at += part.numel()
        for name in {name for of_rank in everyone for name in of_rank[rank]}:
            del self._snapshot.tensors[name]

    def read_shared(self) -> dict[str, Any]:
        """What is equal on all ranks."""
        return self._snapshot.shared

    def read_own(self, rank: int) -> dict[str, Any]:
        """This rank's own; nobody asks for another's, since the ranks are the same."""
        assert rank == dist.get_rank(), (rank, dist.get_rank())
        return self._snapshot.own


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as bytes."""
    return tensor.view(-1).view(torch.uint8)


def _size(parts: list[Tensor]) -> int:
    return sum(part.numel() for part in parts)


def _joined(parts: list[list[Tensor]]) -> Tensor:
    flat = [part for of_rank in parts for part in of_rank]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)
