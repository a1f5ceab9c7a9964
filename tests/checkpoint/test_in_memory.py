"""A snapshot that is read from the memory of the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe_ds.checkpoint.in_memory import SnapshotInMemory
from dynmoe_ds.checkpoint.store import Snapshot
from tests.helpers.spawn import run_ranks


def exchange(rank: int, world_size: int) -> tuple[dict[str, Tensor], list[str]]:
    """Rank 0 holds a and b, rank 1 holds c. Both want b, one after another c and a."""
    held: dict[str, Tensor] = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)} if rank == 0 else {}
    held |= {"c": torch.tensor(7)} if rank == 1 else {}
    snapshot = Snapshot(step=1, tensors=held, shared={}, own={}, described={})
    state = SnapshotInMemory(snapshot, None)
    found = {"b": torch.empty(2, 2, dtype=torch.bfloat16), "c": torch.tensor(0), "a": torch.empty(3)}
    state.read_tensors({"b": found["b"]}, None)
    state.read_tensors({"c": found["c"]} if rank == 0 else {"a": found["a"]}, None)
    return found, list(held)


def test_what_was_read_is_right_and_forgotten() -> None:
    (first, left), (second, also_left) = run_ranks(exchange, 2)
    assert torch.equal(first["b"], torch.ones(2, 2, dtype=torch.bfloat16)) and torch.equal(second["b"], first["b"])
    assert int(first["c"]) == 7 and second["a"].tolist() == [0.0, 1.0, 2.0]
    assert left == also_left == [], "its memory is needed for what is made of it"
