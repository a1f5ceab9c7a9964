"""Records that nobody has taken yet, across changes of the pools."""

from __future__ import annotations

from collections.abc import Mapping

from dynmoe_ds.adaptation import add_records
from dynmoe_ds.moe import MoELayer, Placement, per_slot_statistics, renumbered
from dynmoe_ds.routing import RoutingRecords

Records = dict[str, RoutingRecords]


class UntakenRecords:
    """This rank's records since the last change of the pools, and the sum over ranks of those from before it.

    own: by layer. closed: the placements that the others were made under, and these; None for none.
    """

    def __init__(self, layers: Mapping[str, MoELayer]) -> None:
        self._layers = layers
        self.own: Records = {}
        self.closed: tuple[dict[str, Placement], Records] | None = None

    def add(self, records: Records) -> None:
        """Take in this rank's records of an optimiser step."""
        self.own = add_records(self.own, records)

    def close(self, total: Records) -> None:
        """Before the pools change: `total` is what all ranks have of their own."""
        self.own, self.closed = {}, (self._placements(), self.with_closed(total))

    def with_closed(self, records: Records) -> Records:
        """`records` and those from before the last change, by the slots there are now."""
        if self.closed is None:
            return dict(records)
        placements, closed = self.closed
        now = self._placements()
        moved = {
            name: renumbered(record, placements[name], now[name], per_slot_statistics(self._layers[name]))
            for name, record in closed.items()
        }
        return add_records(moved, records)

    def _placements(self) -> dict[str, Placement]:
        return {name: layer.placement for name, layer in self._layers.items()}
