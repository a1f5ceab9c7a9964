"""What an adaptation event holds, and its story in words for the console and the report.

An event is a plain dict, one per adaptation, that becomes one line of `adaptation.jsonl`:

    {"step": 60, "window_steps": 30, "rule": "paper", "warnings": ["..."],
     "layers": {"model.layers.1.mlp": {
        "pruned": [1],
        "grown": [{"expert_id": 4, "slot": 2, "rank": 0, "parent_id": 2, "seeding": "copy_nearest"}],
        "moved": [{"expert_id": 3, "from_slot": 1, "to_slot": 9}],
        "live_before": 4, "live_after": 4, "num_slots_before": 16, "num_slots": 16,
        "tokens_per_expert": {"0": 812, "1": 0, "2": 700, "3": 650},
        "num_tokens": 2048, "num_unrouted": 31, "out_of_slots": false, "mean_k": 1.9}}}

`tokens_per_expert` has every expert that was live in the window; `parent_id` is null for a seeding without a parent.
The seeding of an expert that comes from a split of its parent is `split`. Of two experts that were exchanged `moved`
has both, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EventDict = Mapping[str, Any]

EVENT_KEYS = ("step", "window_steps", "rule", "layers", "warnings")
LAYER_KEYS = (
    "pruned",
    "grown",
    "moved",
    "live_before",
    "live_after",
    "num_slots",
    "tokens_per_expert",
    "num_tokens",
    "num_unrouted",
    "out_of_slots",
    "mean_k",
)


def event_fault(event: EventDict) -> str | None:
    """What an event lacks, in words; None where it is whole."""
    missing = [key for key in EVENT_KEYS if key not in event]
    if missing:
        return f"the event lacks {', '.join(missing)}"
    if not isinstance(event["layers"], Mapping):
        return "the event's `layers` is not an object"
    for layer, change in event["layers"].items():
        missing = [key for key in LAYER_KEYS if not isinstance(change, Mapping) or key not in change]
        if missing:
            return f"the event's layer {layer} lacks {', '.join(missing)}"
    return None


def has_change(change: Mapping[str, Any]) -> bool:
    """Whether one layer of an event had an expert added, removed or moved, or its pool resized."""
    return bool(change["grown"] or change["pruned"] or change["moved"] or _resized_from(change) is not None)


def describe_change(change: Mapping[str, Any]) -> str:
    """What happened to one layer: `grew expert 4 (copy_nearest of 2), pruned 1 -> 5 live of 16 slots`."""
    parts = []
    for number, grown in enumerate(change["grown"]):
        parent = "" if grown["parent_id"] is None else f" of {grown['parent_id']}"
        parts.append(f"{'' if number else 'grew '}expert {grown['expert_id']} ({grown['seeding']}{parent})")
    if change["pruned"]:
        parts.append(f"pruned {' '.join(str(expert_id) for expert_id in change['pruned'])}")
    for number, moved in enumerate(change["moved"]):
        verb = "" if number else "moved "
        parts.append(f"{verb}expert {moved['expert_id']} from slot {moved['from_slot']} to {moved['to_slot']}")
    if (before := _resized_from(change)) is not None:
        parts.append(f"pool resized from {before} slots")
    what = ", ".join(parts) or "unchanged"
    return f"{what} -> {change['live_after']} live of {change['num_slots']} slots"


def _resized_from(change: Mapping[str, Any]) -> int | None:
    """The size that a layer's pool had before the adaptation resized it; None where it did not."""
    before: int = change.get("num_slots_before", change["num_slots"])  # runs of earlier versions have no such key
    return before if before != change["num_slots"] else None


def out_of_slots_advice(change: Mapping[str, Any]) -> str:
    """What to do about a layer that wanted an expert and had no free slot."""
    return (
        f"is out of slots: {change['live_after']} of {change['num_slots']} are live, so no further expert could be "
        "added. Raise model.num_slots, use adaptation.pool=elastic, end growth earlier (adaptation.last_growth_step), "
        "or prune more (adaptation.prune_below_share)."
    )


def describe_event(event: EventDict) -> list[str]:
    """The lines that tell an event on the console: one per changed layer and per full pool; none if nothing changed.

    Warnings are in the run folder and the report: the trainer logs the first of each layer, a console needs no more.
    """
    prefix = f"step {event['step']}: "
    lines = []
    for layer, change in event["layers"].items():
        if has_change(change):
            lines.append(f"{prefix}layer {layer} {describe_change(change)}")
        if change["out_of_slots"]:
            lines.append(f"{prefix}layer {layer} {out_of_slots_advice(change)}")
    return lines
