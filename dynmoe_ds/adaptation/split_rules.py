"""Rules whose experts are born by a split, for every router: they do not wait for tokens without an expert.

All prune as the paper's rule does. A window without tokens changes nothing.
"""

from __future__ import annotations

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.adaptation.rules import Decision, busiest_first, idle_experts, register_rule, tokens_per_expert
from dynmoe_ds.moe import Placement
from dynmoe_ds.moe.ledger import STRAIN
from dynmoe_ds.routing import RoutingRecords


@register_rule("split_all", needs_sample=True)
def split_all(records: RoutingRecords, placement: Placement, config: AdaptationConfig) -> Decision:
    """Every expert that stays is split, the busiest first: a layer doubles as long as it has slots."""
    pruned, load = _pruned_and_loads(records, placement, config)
    return Decision(pruned_ids=pruned, split_ids=tuple(busiest_first(load)))


@register_rule("split_strained", needs_sample=True, needs_strain=True)
def split_strained(records: RoutingRecords, placement: Placement, config: AdaptationConfig) -> Decision:
    """The expert of greatest strain is split: where the loss pulls most, as `StepLedger` defines it."""
    pruned, load = _pruned_and_loads(records, placement, config)
    by_slot = records.statistics[STRAIN].tolist()
    strain = {expert_id: by_slot[placement.slot_of(expert_id)] for expert_id in load}
    most = [expert_id for expert_id in busiest_first(strain)[:1] if strain[expert_id] > 0]
    return Decision(pruned_ids=pruned, split_ids=tuple(most))


@register_rule("split_loaded", needs_sample=True, needs_unequal_loads=True)
def split_loaded(records: RoutingRecords, placement: Placement, config: AdaptationConfig) -> Decision:
    """Every expert with more than `split_above_load` times the mean load is split, the busiest first."""
    pruned, load = _pruned_and_loads(records, placement, config)
    limit = config.split_above_load * int(records.tokens_per_slot.sum()) / len(placement.live_ids)
    return Decision(pruned_ids=pruned, split_ids=tuple(e for e in busiest_first(load) if load[e] > limit))


def _pruned_and_loads(
    records: RoutingRecords, placement: Placement, config: AdaptationConfig
) -> tuple[tuple[int, ...], dict[int, int]]:
    """The experts to prune, and the loads of those that stay; no loads in a window without tokens."""
    pruned = idle_experts(records, placement, config)
    if int(records.num_tokens) == 0:
        return pruned, {}
    load = tokens_per_expert(records, placement)
    return pruned, {expert_id: tokens for expert_id, tokens in load.items() if expert_id not in pruned}
