"""Records under another placement: counts follow their experts to other slots, and to a pool of another size."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from dynmoe_ds.moe.layer import MoELayer
from dynmoe_ds.moe.ledger import STRAIN
from dynmoe_ds.moe.placement import Placement
from dynmoe_ds.routing import RoutingRecords


def per_slot_statistics(layer: MoELayer) -> frozenset[str]:
    """Names of the statistics whose first dimension is that of slots."""
    shapes = layer.router.statistics_shapes()
    return frozenset({STRAIN, *(name for name, shape in shapes.items() if shape[:1] == (layer.num_slots,))})


def renumbered(record: RoutingRecords, old: Placement, new: Placement, per_slot: Collection[str]) -> RoutingRecords:
    """Records made under `old`, by the slots of `new`. `per_slot`: the statistics that have a row per slot.

    What is counted by slot of experts that are not live in `new` is left out; totals over experts keep it.
    """
    kept = [id_ for id_ in old.live_ids if id_ in new.slots_by_id]
    from_slots, to_slots = [old.slot_of(id_) for id_ in kept], [new.slot_of(id_) for id_ in kept]

    def moved(rows: Tensor) -> Tensor:
        value = rows.new_zeros(new.num_slots, *rows.shape[1:])
        value[to_slots] = rows[from_slots]
        return value

    statistics = {name: moved(value) if name in per_slot else value for name, value in record.statistics.items()}
    return replace(record, tokens_per_slot=moved(record.tokens_per_slot), statistics=statistics)
