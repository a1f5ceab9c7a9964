"""A plan: what an adaptation will do to the pools, as data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from dynmoe_ds.errors import PlacementError
from dynmoe_ds.moe import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class Prune:
    """Set the slot of `expert_id` free."""

    layer: str
    expert_id: int

    def apply(self, placement: Placement) -> Placement:
        return placement.without(self.expert_id)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "prune", "layer": self.layer, "expert_id": self.expert_id}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grow:
    """A new expert `expert_id` in the free slot `slot`, with gate row `gate_row` [D] of length 1.

    seeding: what its weights and moments start from. parent_id: the expert they are copied from; None for `mean` and
    `fresh`, and for `copy_nearest` until the gate rows have been read.
    """

    layer: str
    expert_id: int
    slot: int
    gate_row: Tensor
    seeding: str
    parent_id: int | None

    def apply(self, placement: Placement) -> Placement:
        return _with_new_expert(placement, self.layer, self.expert_id, self.slot)

    def with_parent(self, parent_id: int) -> Grow:
        return replace(self, parent_id=parent_id)

    def to_dict(self) -> dict[str, Any]:
        row = hashlib.sha256(self.gate_row.double().cpu().numpy().tobytes()).hexdigest()
        return {
            "kind": "grow",
            "layer": self.layer,
            "expert_id": self.expert_id,
            "slot": self.slot,
            "gate_row_sha256": row,
            "seeding": self.seeding,
            "parent_id": self.parent_id,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Make two of the expert `parent_id`: it keeps its id and slot, and a child `expert_id` takes the free slot `slot`.

    Both are copies of the parent whose gate rows part in opposite directions, so that its tokens are shared among them.
    """

    layer: str
    parent_id: int
    expert_id: int
    slot: int

    def apply(self, placement: Placement) -> Placement:
        placement.slot_of(self.parent_id)
        return _with_new_expert(placement, self.layer, self.expert_id, self.slot)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "split",
            "layer": self.layer,
            "parent_id": self.parent_id,
            "expert_id": self.expert_id,
            "slot": self.slot,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Carry `expert_id` with its moments to the slot `to_slot`, on whatever rank that is.

    exchange_with: the expert that holds the slot and takes the mover's place, so that a full pool can be rebalanced,
    too. None if the slot is free.
    """

    layer: str
    expert_id: int
    to_slot: int
    exchange_with: int | None = None

    def apply(self, placement: Placement) -> Placement:
        if self.exchange_with is None:
            return placement.moved(self.expert_id, self.to_slot)
        return placement.exchanged(self.expert_id, self.to_slot, self.exchange_with)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "move",
            "layer": self.layer,
            "expert_id": self.expert_id,
            "to_slot": self.to_slot,
            "exchange_with": self.exchange_with,
        }


PlanItem: TypeAlias = Prune | Grow | Split | Move


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Items in the order in which they are carried out."""

    items: tuple[PlanItem, ...]

    def apply(self, placements: Mapping[str, Placement]) -> dict[str, Placement]:
        """The placements after the plan. Raises: PlacementError if an item contradicts them."""
        after = dict(placements)
        for item in self.items:
            after[item.layer] = item.apply(after[item.layer])
        return after

    def of_layer(self, layer: str) -> tuple[PlanItem, ...]:
        return tuple(item for item in self.items if item.layer == layer)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal on all ranks, readable in an error message; gate rows enter as checksums."""
        return {f"item {i}": item.to_dict() for i, item in enumerate(self.items)} | {"items": len(self.items)}


def _with_new_expert(placement: Placement, layer: str, expert_id: int, slot: int) -> Placement:
    if expert_id != placement.next_id:
        raise PlacementError(
            f"The plan calls a new expert of {layer} {expert_id}, but the next id is {placement.next_id}."
        )
    return placement.with_new_expert(slot)
