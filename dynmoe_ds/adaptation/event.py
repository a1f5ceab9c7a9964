"""What an adaptation did, for logs and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynmoe_ds.adaptation.plan import Grow, Move, Plan, PlanItem, Prune, Split
from dynmoe_ds.adaptation.rules import tokens_per_expert
from dynmoe_ds.moe import Placement
from dynmoe_ds.routing import RoutingRecords

# One of the two was seen in every run that failed to train well: more than this share of the tokens without an open
# gate, or more than this share of the live experts used by the average token.
UNROUTED_ALARM_SHARE = 0.05
CROWDED_ALARM_SHARE = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptationEvent:
    """One adaptation. layers: by layer name, plain values as in `to_dict`. warnings: sentences for a person."""

    step: int
    window_steps: int
    rule: str
    layers: dict[str, dict[str, Any]]
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The event as plain values, ready for JSON."""
        return {
            "step": self.step,
            "window_steps": self.window_steps,
            "rule": self.rule,
            "layers": self.layers,
            "warnings": list(self.warnings),
        }


def describe(
    plan: Plan,
    *,
    step: int,
    window_steps: int,
    rule: str,
    records: Mapping[str, RoutingRecords],
    before: Mapping[str, Placement],
    after: Mapping[str, Placement],
    full: frozenset[str],
    num_slots: Mapping[str, tuple[int, int]],
) -> AdaptationEvent:
    """The event of a plan that has been carried out on the placements `before`.

    full: the layers that had no free slot for an expert. num_slots: the sizes of each layer's pool before and after the
    adaptation, which may have resized it before and after the plan.
    """
    layers, warnings = {}, []
    for name, record in records.items():
        items = plan.of_layer(name)
        layers[name] = {
            "pruned": [item.expert_id for item in items if isinstance(item, Prune)],
            "grown": [_grown(item, after[name]) for item in items if isinstance(item, Grow | Split)],
            "moved": _moved(items, before[name]),
            "live_before": len(before[name].live_ids),
            "live_after": len(after[name].live_ids),
            "num_slots_before": num_slots[name][0],
            "num_slots": num_slots[name][1],
            "tokens_per_expert": {str(id_): n for id_, n in tokens_per_expert(record, before[name]).items()},
            "num_tokens": int(record.num_tokens),
            "num_unrouted": int(record.num_unrouted),
            "mean_k": record.mean_k,
            "out_of_slots": name in full,
        }
        warnings += alarms(name, record, num_live=len(before[name].live_ids))
    return AdaptationEvent(step=step, window_steps=window_steps, rule=rule, layers=layers, warnings=tuple(warnings))


def alarms(layer: str, record: RoutingRecords, *, num_live: int) -> list[str]:
    """Signs that routing goes wrong, one sentence each."""
    found = []
    if record.unrouted_share > UNROUTED_ALARM_SHARE:
        found.append(
            f"{layer}: {record.unrouted_share:.1%} of the tokens have no open gate. If that "
            "lasts, thresholds run away: lower the losses that close gates (price, efficiency, load balance)."
        )
    if num_live > 1 and record.mean_k > CROWDED_ALARM_SHARE * num_live:
        found.append(
            f"{layer}: tokens use {record.mean_k:.2f} of {num_live} experts on average, nearly all of them. "
            "If that lasts, raise router.price_weight."
        )
    return found


def _moved(items: tuple[PlanItem, ...], placement: Placement) -> list[dict[str, int]]:
    """Every expert that changes slots, in the plan's order: of an exchange both. `placement`: before the plan."""
    moved = []
    for item in items:
        if isinstance(item, Move):
            from_slot = placement.slot_of(item.expert_id)
            moved.append({"expert_id": item.expert_id, "from_slot": from_slot, "to_slot": item.to_slot})
            if item.exchange_with is not None:
                moved.append({"expert_id": item.exchange_with, "from_slot": item.to_slot, "to_slot": from_slot})
        placement = item.apply(placement)
    return moved


def _grown(item: Grow | Split, placement: Placement) -> dict[str, Any]:
    return {
        "expert_id": item.expert_id,
        "slot": item.slot,
        "rank": placement.rank_of(item.slot),
        "parent_id": item.parent_id,
        "seeding": item.seeding if isinstance(item, Grow) else "split",
    }
