"""The adaptation events that the tests tell, draw and store."""

from __future__ import annotations

import copy
from typing import Any

LAYER = "model.layers.1.mlp"

_CHANGE: dict[str, Any] = {
    "pruned": [1],
    "grown": [{"expert_id": 4, "slot": 2, "rank": 0, "parent_id": 2, "seeding": "copy_nearest"}],
    "moved": [],
    "live_before": 5,
    "live_after": 5,
    "num_slots": 16,
    "tokens_per_expert": {"0": 812, "1": 0, "2": 700, "3": 650, "9": 5},
    "num_tokens": 2048,
    "num_unrouted": 31,
    "out_of_slots": False,
    "mean_k": 1.9,
}


def event(step: int = 60, *, warnings: tuple[str, ...] = (), **changed: Any) -> dict[str, Any]:
    """An event of one layer; `changed` replaces fields of the layer."""
    change = {**copy.deepcopy(_CHANGE), **changed}
    return {"step": step, "window_steps": 30, "rule": "paper", "layers": {LAYER: change}, "warnings": list(warnings)}
