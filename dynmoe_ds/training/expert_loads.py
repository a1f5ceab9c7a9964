"""What the layers did since the last log, with loads by expert id that stay right across adaptations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dynmoe_ds.moe import Placement
from dynmoe_ds.routing import RoutingRecords
from dynmoe_ds.telemetry import Metric


class ExpertLoads:
    """Records by layer name, and tokens by layer name and expert id.

    Records count by slot, and an adaptation can give a slot to another expert. So add the records after every
    adaptation, under the placements from before it.
    """

    def __init__(self) -> None:
        self.records: dict[str, RoutingRecords] = {}
        self.tokens_per_expert: dict[str, Counter[int]] = {}

    def add(self, records: Mapping[str, RoutingRecords], placements: Mapping[str, Placement]) -> None:
        """Count `records`, summed over all ranks and all made under `placements`."""
        for layer, record in records.items():
            self.records[layer] = self.records[layer] + record if layer in self.records else record
            tokens_per_slot = record.tokens_per_slot.tolist()
            load = self.tokens_per_expert.setdefault(layer, Counter())
            for expert_id, slot in placements[layer].slots_by_id.items():
                load[expert_id] += tokens_per_slot[slot]

    def metrics(self, placements: Mapping[str, Placement]) -> list[Metric]:
        """The `moe/...` metrics, with the live experts of `placements` as they are now; equal on all ranks."""
        values: dict[str, float] = {}
        for layer, record in self.records.items():
            busiest = max(self.tokens_per_expert[layer].values())
            values[f"moe/mean_k/{layer}"] = record.mean_k
            values[f"moe/live_experts/{layer}"] = len(placements[layer].live_ids)
            values[f"moe/unrouted_share/{layer}"] = record.unrouted_share
            values[f"moe/busiest_share/{layer}"] = busiest / max(int(record.num_tokens), 1)
        if self.records:
            values["moe/mean_k"] = sum(record.mean_k for record in self.records.values()) / len(self.records)
        return [Metric(name=name, value=value, reduction="last") for name, value in values.items()]

    def line(self, placements: Mapping[str, Placement]) -> dict[str, dict[str, Any]]:
        """One line of `experts.jsonl` (its fields: `RunFolder.append_experts`).

        It has every expert that is live in `placements`, with 0 for one that nobody chose or that was just added, and
        those that took tokens before they were pruned.
        """
        return {
            layer: {
                "load": dict.fromkeys(placements[layer].live_ids, 0) | dict(+self.tokens_per_expert[layer]),
                "num_tokens": int(record.num_tokens),
                "num_unrouted": int(record.num_unrouted),
            }
            for layer, record in self.records.items()
        }
