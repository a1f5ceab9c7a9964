"""Elastic pools: how many slots a layer should have. Pure, so that all ranks come to the same sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dynmoe_ds.adaptation.controller import AdaptationController
from dynmoe_ds.moe import Placement, renumbered
from dynmoe_ds.routing import RoutingRecords

_SLOTS_PER_EXPERT = 4 / 3
"""Of a pool that was resized: one slot in four is free, so that not every expert that comes or goes costs a resize."""


def sizes_to_grow(
    controller: AdaptationController,
    records: Mapping[str, RoutingRecords],
    placements: Mapping[str, Placement],
    per_slot: Mapping[str, Collection[str]],
    **decision: Any,
) -> dict[str, int]:
    """Sizes of the pools that are too small for the experts that the adaptation wants to add, by layer.

    per_slot: the statistics of `records` that have a row per slot, by layer. decision: what else
    `AdaptationController.decide` takes. `adaptation.max_slots` is never passed.
    """
    rooms, max_slots = dict(placements), controller.config.max_slots
    while True:
        seen = {
            name: renumbered(record, placements[name], rooms[name], per_slot[name]) for name, record in records.items()
        }
        plan, full = controller.decide(seen, rooms, **decision)
        larger = {name: _at_most(2 * rooms[name].num_slots, rooms[name], max_slots) for name in full}
        larger = {name: size for name, size in larger.items() if size > rooms[name].num_slots}
        if not larger:
            break
        rooms |= {name: rooms[name].resized(size) for name, size in larger.items()}
    after = plan.apply(rooms)
    return {
        name: max(_at_most(_comfortable(after[name]), room, max_slots), placements[name].num_slots)
        for name, room in rooms.items()
        if room is not placements[name]
    }


def sizes_to_shrink(placements: Mapping[str, Placement]) -> dict[str, int]:
    """Sizes of the pools that would do with half of their slots or less, by layer."""
    sizes = {name: _comfortable(placement) for name, placement in placements.items()}
    return {name: size for name, size in sizes.items() if 2 * size <= placements[name].num_slots}


def _comfortable(placement: Placement) -> int:
    """Slots for the live experts and some more."""
    num_slots = max(len(placement.live_ids) + 1, round(len(placement.live_ids) * _SLOTS_PER_EXPERT))
    return -(-num_slots // placement.ep_size) * placement.ep_size


def _at_most(num_slots: int, placement: Placement, max_slots: int | None) -> int:
    """`num_slots`, or the most that is allowed and that the ranks can share."""
    return num_slots if max_slots is None else min(num_slots, max_slots // placement.ep_size * placement.ep_size)
