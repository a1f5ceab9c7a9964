"""The controller: from the records of all layers to a plan. Pure, so that all ranks come to the same plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.adaptation.plan import Grow, Plan, PlanItem, Prune, Split
from dynmoe_ds.adaptation.rebalancing import rebalancing_moves
from dynmoe_ds.adaptation.rules import Decision, busiest_first, rule_named, tokens_per_expert
from dynmoe_ds.errors import PlacementError, RoutingError
from dynmoe_ds.moe import Placement
from dynmoe_ds.moe.ledger import STRAIN
from dynmoe_ds.routing import RoutingRecords


class AdaptationController:
    """Applies the configured rule to every layer, finds slots and parents for what it adds, and evens out the ranks.

    rule: the configured one. Raises: ConfigError for an unknown rule.
    """

    def __init__(self, config: AdaptationConfig) -> None:
        self.config = config
        self.rule = rule_named(config.rule)

    def decide(
        self,
        records: Mapping[str, RoutingRecords],
        placements: Mapping[str, Placement],
        *,
        step: int = 0,
        min_experts: Mapping[str, int] | None = None,
    ) -> tuple[Plan, frozenset[str]]:
        """The plan after optimiser step `step`, and the layers that wanted an expert but had no free slot.

        records: by layer, summed over all data-parallel ranks. Pruning comes first, so a slot set free can be used at
        once; it leaves `min_experts` of a layer, by default 1, and spares the busiest. A new expert goes to a free slot
        on the rank with the fewest live experts. Experts split in the rule's order as long as there are slots. Last
        come the moves of `rebalancing_moves` on what is there then; an expert that was just born can be moved, too.
        Raises: RoutingError if the rule needs strain and the records have none.
        """
        items: list[PlanItem] = []
        full: set[str] = set()
        for layer, record in records.items():
            if self.rule.needs_strain and STRAIN not in record.statistics:
                raise RoutingError(
                    f"adaptation.rule is {self.config.rule}, but the records of {layer} hold no strain. Record with "
                    "StepLedger(with_strain=True)."
                )
            placement = placements[layer]
            pool = _Pool(placement=placement, load=tokens_per_expert(record, placement))
            decision = self.rule.decide(record, placement, self.config)
            changes: list[PlanItem] = [
                Prune(layer=layer, expert_id=expert_id)
                for expert_id in self._pruned(decision, pool, (min_experts or {}).get(layer, 1))
            ]
            if self.may_grow(step):
                added, is_full = self._added(layer, decision, pool.after(*changes))
                changes += added
                full |= {layer} if is_full else set()
            pool = pool.after(*changes)
            items += [*changes, *rebalancing_moves(layer, pool.load, pool.placement, self.config)]
        return Plan(items=tuple(items)), frozenset(full)

    def may_grow(self, step: int) -> bool:
        """Whether the adaptation after optimiser step `step` may add experts."""
        return self.config.last_growth_step is None or step <= self.config.last_growth_step

    def _pruned(self, decision: Decision, pool: _Pool, min_experts: int) -> tuple[int, ...]:
        """What the rule wants to prune, less the busiest that must stay for `min_experts` to be left."""
        num_spared = min_experts - (len(pool.load) - len(decision.pruned_ids))
        if num_spared <= 0:
            return decision.pruned_ids
        spared = busiest_first({expert_id: pool.load[expert_id] for expert_id in decision.pruned_ids})[:num_spared]
        return tuple(expert_id for expert_id in decision.pruned_ids if expert_id not in spared)

    def _added(self, layer: str, decision: Decision, pool: _Pool) -> tuple[list[PlanItem], bool]:
        """The experts that come, and whether one more was wanted than there are slots. `pool`: after pruning."""
        items: list[PlanItem] = []
        for parent_id in decision.split_ids:
            slot = pool.least_loaded_free_slot()
            if slot is None:
                return items, True
            items.append(Split(layer=layer, parent_id=parent_id, expert_id=pool.placement.next_id, slot=slot))
            pool = pool.after(items[-1])
        if decision.new_gate_row is not None:
            slot = pool.least_loaded_free_slot()
            if slot is None:
                return items, True
            parent = busiest_first(pool.load)[0] if self.config.seeding == "copy_most_loaded" else None
            items.append(
                Grow(
                    layer=layer,
                    expert_id=pool.placement.next_id,
                    slot=slot,
                    gate_row=decision.new_gate_row,
                    seeding=self.config.seeding,
                    parent_id=parent,
                )
            )
        return items, False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pool:
    """A layer's placement and the load that each of its experts can expect: tokens of the window by expert id."""

    placement: Placement
    load: Mapping[int, int]

    def after(self, *items: PlanItem) -> _Pool:
        """The pool after items of a plan. The halves of a split share the parent's load; an added expert has none."""
        placement, load = self.placement, dict(self.load)
        for item in items:
            placement = item.apply(placement)
            match item:
                case Prune(expert_id=expert_id):
                    del load[expert_id]
                case Split(parent_id=parent_id, expert_id=expert_id):
                    load[expert_id] = load[parent_id] // 2
                    load[parent_id] -= load[expert_id]
                case Grow(expert_id=expert_id):
                    load[expert_id] = 0
        return _Pool(placement=placement, load=load)

    def least_loaded_free_slot(self) -> int | None:
        by_slot = {slot: self.load[expert_id] for expert_id, slot in self.placement.slots_by_id.items()}
        return self.placement.least_loaded_free_slot(by_slot)


def nearest_expert(gate_row: Tensor, gate_rows: Tensor, placement: Placement) -> int:
    """The live expert whose gate row [S, D] has the greatest cosine with `gate_row` [D]; the oldest of equals.

    Raises: PlacementError if no expert is live.
    """
    if not placement.live_ids:
        raise PlacementError("There is no live expert to copy.")
    rows = gate_rows.double()
    cosine = (rows @ gate_row.to(rows)) / torch.linalg.vector_norm(rows, dim=1).clamp_min(1e-12)
    return max(placement.live_ids, key=lambda expert_id: (float(cosine[placement.slot_of(expert_id)]), -expert_id))
