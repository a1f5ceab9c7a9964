"""The controller: from the records of all layers to a plan. Pure, so that all ranks come to the same plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.adaptation.plan import Grow, Move, Plan, Prune
from dynmoe_ds.adaptation.rules import rule_named, tokens_per_expert
from dynmoe_ds.errors import PlacementError
from dynmoe_ds.moe import Placement
from dynmoe_ds.routing import RoutingRecords


class AdaptationController:
    """Applies the configured rule to every layer and finds slots and parents for what it adds.

    Raises: ConfigError for an unknown rule.
    """

    def __init__(self, config: AdaptationConfig) -> None:
        self.config = config
        self._rule = rule_named(config.rule)

    def decide(
        self, records: Mapping[str, RoutingRecords], placements: Mapping[str, Placement], *, step: int = 0
    ) -> tuple[Plan, frozenset[str]]:
        """The plan after optimiser step `step`, and the layers that wanted an expert but had no free slot.

        records: by layer, summed over all data-parallel ranks. Pruning comes first, so a slot set free can be used at
        once. A new expert goes to a free slot on the rank with the fewest live experts.
        """
        items: list[Prune | Grow | Move] = []
        full: set[str] = set()
        for layer, record in records.items():
            placement = placements[layer]
            decision = self._rule(record, placement, self.config)
            for expert_id in decision.pruned_ids:
                items.append(Prune(layer=layer, expert_id=expert_id))
                placement = placement.without(expert_id)
            if decision.new_gate_row is not None and self._may_grow(step):
                load_by_slot = dict(enumerate(record.tokens_per_slot.tolist()))
                slot = placement.least_loaded_free_slot(load_by_slot)
                if slot is None:
                    full.add(layer)
                    continue
                parent = self._most_loaded(record, placement) if self.config.seeding == "copy_most_loaded" else None
                items.append(
                    Grow(
                        layer=layer,
                        expert_id=placement.next_id,
                        slot=slot,
                        gate_row=decision.new_gate_row,
                        seeding=self.config.seeding,
                        parent_id=parent,
                    )
                )
        return Plan(items=tuple(items)), frozenset(full)

    def _may_grow(self, step: int) -> bool:
        return self.config.last_growth_step is None or step <= self.config.last_growth_step

    @staticmethod
    def _most_loaded(record: RoutingRecords, placement: Placement) -> int:
        load = tokens_per_expert(record, placement)
        return max(load, key=lambda expert_id: (load[expert_id], -expert_id))


def nearest_expert(gate_row: Tensor, gate_rows: Tensor, placement: Placement) -> int:
    """The live expert whose gate row [S, D] has the greatest cosine with `gate_row` [D]; the oldest of equals.

    Raises: PlacementError if no expert is live.
    """
    if not placement.live_ids:
        raise PlacementError("There is no live expert to copy.")
    rows = gate_rows.double()
    cosine = (rows @ gate_row.to(rows)) / torch.linalg.vector_norm(rows, dim=1).clamp_min(1e-12)
    return max(placement.live_ids, key=lambda expert_id: (float(cosine[placement.slot_of(expert_id)]), -expert_id))
