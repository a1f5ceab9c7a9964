"""What the layers of an engine saw: in this optimiser step, in the window, and since somebody asked last."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from dynmoe_ds.adaptation import RecordingWindow, add_records
from dynmoe_ds.distributed import communication
from dynmoe_ds.moe import MoELayer, Placement, per_slot_statistics, renumbered
from dynmoe_ds.moe.ledger import STRAIN
from dynmoe_ds.routing import RoutingRecords
from dynmoe_ds.routing.records import pack, unpack
from dynmoe_ds.routing.token_kinds import kind_shapes

Records = dict[str, RoutingRecords]
"""By layer name."""


class RecordBook:
    """Keeps this rank's records, counted by slot, across changes of the pools.

    of_step: of the micro steps of the optimiser step that is not over. window: of the steps that the next adaptation is
    decided from; None where there is no adaptation. with_strain: whether a layer's records have the strain of experts.
    """

    def __init__(
        self, layers: Mapping[str, MoELayer], window: RecordingWindow | None, num_kinds: int, *, with_strain: bool
    ) -> None:
        self._layers, self._num_kinds, self._with_strain = layers, num_kinds, with_strain
        self.window = window
        self.of_step: Records = {}
        self._last: Records = {}
        self._last_placements: dict[str, Placement] = {}
        self._known_loads: dict[str, dict[int, int]] = {}
        self._untaken: Records = {}
        self._num_steps_untaken = 0
        # Summed over ranks, with the placements that they were made under.
        self._closed: tuple[dict[str, Placement], Records] | None = None

    def add_micro_step(self, records: Records) -> None:
        """Take in the forward passes of a micro step."""
        self.of_step = add_records(self.of_step, records)

    def take_step(self) -> Records:
        """The records of the optimiser step, which is over."""
        records, self.of_step = self.of_step, {}
        return records

    def keep(self, step: int, records: Records) -> None:
        """Count the records of optimiser step `step`."""
        self._last, self._last_placements = records, self._placements()
        self._untaken = add_records(self._untaken, records)
        self._num_steps_untaken += 1
        if self.window is not None:
            self.window.add(step, records)

    def reduce(self, records: Records, layers: Mapping[str, MoELayer] | None = None) -> Records:
        """Records of `layers` (default: all) summed over all ranks, in one collective.

        Every layer takes part, also one without records here, so that all ranks send the same. Collective: every rank.
        """
        layers = self._layers if layers is None else layers
        everything = {name: self._none(layer) for name, layer in layers.items()}
        everything = {name: none + records[name] if name in records else none for name, none in everything.items()}
        if not everything:
            return {}
        flat = pack(everything)
        if dist.get_world_size() > 1:
            with communication():
                dist.all_reduce(flat)  # ranks with the same tokens have counted a share each
        return unpack(flat, everything)

    def close(self) -> None:
        """Before the pools change: sum what was counted under the placements as they are. Collective: every rank."""
        self._known_loads = self.last_loads()
        self._last, self._last_placements = {}, {}
        if self._num_steps_untaken > 0 or self._closed is None:
            total = self._with_closed(self.reduce(self._untaken))
            self._closed = self._placements(), total
            self._untaken, self._num_steps_untaken = {}, 0

    def renumber(self, before: Mapping[str, Placement]) -> None:
        """After the pools have changed: let the window's records follow their experts to the slots they have now."""
        if self.window is not None:
            self.window.set(self.renumbered(self.window.records(), before))

    def renumbered(self, records: Records, before: Mapping[str, Placement]) -> Records:
        """Records made under the placements `before`, by the slots there are now."""
        now = {name: self._layers[name] for name in records}
        return {
            name: renumbered(record, before[name], now[name].placement, per_slot_statistics(now[name]))
            for name, record in records.items()
        }

    def take(self, *, reduce: bool = True) -> Records:
        """What `Engine.take_records` gives."""
        records = self._with_closed(self.reduce(self._untaken)) if reduce else self.untaken()
        self._untaken, self._num_steps_untaken, self._closed = {}, 0, None
        return records

    def take_by_placement(self) -> list[tuple[dict[str, Placement], Records]]:
        """What `Engine.take_records_by_placement` gives."""
        closed, self._closed = self._closed, None
        now = (self._placements(), self.take())
        return [now] if closed is None else [closed, now]

    def untaken(self) -> Records:
        """What `take(reduce=False)` would give, which stays where it is."""
        # What is a sum over ranks already is the first rank's.
        return self._with_closed(self._untaken) if dist.get_rank() == 0 else dict(self._untaken)

    def restore(self, *, window: Records, untaken: Records, last_loads: dict[str, dict[int, int]]) -> None:
        """Go on from the records of a checkpoint."""
        if self.window is not None:
            self.window.set(window)
        self._untaken, self._num_steps_untaken, self._closed = dict(untaken), 1, None
        self._last, self._last_placements, self._known_loads = {}, {}, last_loads

    def last_loads(self) -> dict[str, dict[int, int]]:
        """What `Engine.last_loads` gives."""
        if not self._last_placements:  # the pools have changed since, or a checkpoint was loaded
            return self._known_loads
        return {
            name: {expert_id: int(record.tokens_per_slot[slot]) for expert_id, slot in placement.slots_by_id.items()}
            for name, record in self.reduce(self._last).items()
            if (placement := self._last_placements.get(name)) is not None
        }

    def _with_closed(self, records: Records) -> Records:
        """`records` and those from before the last change, by the slots there are now."""
        if self._closed is None:
            return dict(records)
        placements, closed = self._closed
        return add_records(self.renumbered(closed, placements), records)

    def _placements(self) -> dict[str, Placement]:
        return {name: layer.placement for name, layer in self._layers.items()}

    def _none(self, layer: MoELayer) -> RoutingRecords:
        """Records of no token with every statistic, so that all ranks send the same numbers."""
        statistics = layer.router.statistics_shapes() | kind_shapes(self._num_kinds)
        if self._with_strain:
            statistics[STRAIN] = (layer.num_slots,)
        return RoutingRecords.zeros(layer.num_slots, layer.hidden_size, statistics, layer.active.device)
