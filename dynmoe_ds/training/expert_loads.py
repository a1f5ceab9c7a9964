"""What the layers did since the last log, with loads by expert id that stay right across adaptations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynmoe_ds.adaptation import rank_loads
from dynmoe_ds.moe import Placement
from dynmoe_ds.routing import RoutingRecords
from dynmoe_ds.routing.token_kinds import KIND_STATISTICS
from dynmoe_ds.telemetry import Metric


class ExpertLoads:
    """Tokens by layer name and expert id, and what else the records say that belongs to no slot.

    rows_per_rank: by layer and rank of the expert-parallel group, all replicas of the group together.

    Records count by slot, and an adaptation can give a slot to another expert, or resize the pool.
    `engine.take_records_by_placement` gives them with the placements that they were made under.
    """

    def __init__(self) -> None:
        self.records: dict[str, RoutingRecords] = {}
        self.tokens_per_expert: dict[str, Counter[int]] = {}
        self.rows_per_rank: dict[str, list[int]] = {}

    def add(self, records: Mapping[str, RoutingRecords], placements: Mapping[str, Placement]) -> None:
        """Count `records`, summed over all ranks and all made under `placements`."""
        for layer, record in records.items():
            of_no_slot = _without_slots(record)
            self.records[layer] = self.records[layer] + of_no_slot if layer in self.records else of_no_slot
            tokens_per_slot = record.tokens_per_slot.tolist()
            load = self.tokens_per_expert.setdefault(layer, Counter())
            placement = placements[layer]
            new = {expert_id: tokens_per_slot[slot] for expert_id, slot in placement.slots_by_id.items()}
            load.update(new)
            before = self.rows_per_rank.get(layer, [0] * placement.ep_size)
            self.rows_per_rank[layer] = [a + b for a, b in zip(before, rank_loads(new, placement), strict=True)]

    def mean_k(self) -> dict[str, float]:
        """Experts per token by layer."""
        return {layer: record.mean_k for layer, record in self.records.items()}

    def metrics(self, group: str = "moe") -> list[Metric]:
        """The metrics `<group>/...` of every layer and their means over layers; equal on all ranks.

        What there is nothing of, such as the entropy of a load of 0, is left out.
        """
        values: dict[str, float] = {}
        for layer, record in self.records.items():
            load = self.tokens_per_expert[layer]
            values[f"{group}/mean_k/{layer}"] = record.mean_k
            values[f"{group}/unrouted_share/{layer}"] = record.unrouted_share
            values[f"{group}/busiest_share/{layer}"] = max(load.values()) / max(int(record.num_tokens), 1)
            if load.total() > 0:
                values[f"{group}/load_entropy/{layer}"] = load_entropy(list(load.values()))
        if self.records:
            values[f"{group}/mean_k"] = sum(self.mean_k().values()) / len(self.records)
        return [Metric(name=name, value=value, reduction="last") for name, value in values.items()]

    def line(self, placements: Mapping[str, Placement]) -> dict[str, dict[str, Any]]:
        """One line of `experts.jsonl` (its fields: `RunFolder.append_experts`).

        It has every expert that is live in `placements`, with 0 for one that nobody chose or that was just added, and
        those that took tokens before they were pruned.
        """
        return {layer: self._of_layer(layer, placements[layer]) for layer in self.records}

    def _of_layer(self, layer: str, placement: Placement) -> dict[str, Any]:
        record, rows = self.records[layer], self.rows_per_rank[layer]
        found = {
            "load": dict.fromkeys(placement.live_ids, 0) | dict(+self.tokens_per_expert[layer]),
            "num_tokens": int(record.num_tokens),
            "num_unrouted": int(record.num_unrouted),
        }
        return {**found, "rows_per_rank": rows} if len(rows) > 1 else found


def _without_slots(record: RoutingRecords) -> RoutingRecords:
    """What adds up over pools of different sizes: the totals, and the counts per kind of token."""
    kinds = {name: value for name, value in record.statistics.items() if name in KIND_STATISTICS}
    return replace(record, tokens_per_slot=record.tokens_per_slot[:0], statistics=kinds)


def load_entropy(loads: Sequence[int]) -> float:
    """How evenly the experts of a layer are used: 1 where all take equally many tokens, 0 where one takes all.

    H / ln K with H = −Σ s ln s over the shares s of all assignments, for the K experts that were live while the tokens
    were counted; 1 for a single expert.
    """
    if len(loads) == 1:
        return 1.0
    shares = [load / sum(loads) for load in loads if load > 0]
    return -sum(share * math.log(share) for share in shares) / math.log(len(loads))
