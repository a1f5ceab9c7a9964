"""When every expert was born, and when it was pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynmoe_ds.moe import Placement

Lives = dict[str, dict[int, dict[str, int | None]]]


class ExpertLives:
    """Births and deaths by layer and expert id, in optimiser steps; experts of the start are born at 0."""

    def __init__(self, placements: Mapping[str, Placement]) -> None:
        self._lives: Lives = {
            layer: {expert_id: {"born": 0, "died": None} for expert_id in placement.live_ids}
            for layer, placement in placements.items()
        }

    def note(self, step: int, placements: Mapping[str, Placement]) -> None:
        """Take in the placements after optimiser step `step`."""
        for layer, placement in placements.items():
            of_layer = self._lives[layer]
            for expert_id in range(placement.next_id):
                # One that came and went between two looks has lived, too.
                life = of_layer.setdefault(expert_id, {"born": step, "died": None})
                if expert_id not in placement.slots_by_id and life["died"] is None:
                    life["died"] = step

    def of(self, layer: str) -> dict[int, dict[str, int | None]]:
        """`{expert id: {"born": step, "died": step or None}}` of a layer, by id."""
        return {expert_id: dict(life) for expert_id, life in sorted(self._lives[layer].items())}

    def restore(self, layer: str, lives: Mapping[Any, Mapping[str, int | None]]) -> None:
        """Set what `of` gave; ids may be texts, as in JSON."""
        self._lives[layer] = {int(key): {"born": life["born"], "died": life["died"]} for key, life in lives.items()}
