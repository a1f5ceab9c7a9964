"""Records in a checkpoint: by expert id in place of slots, in tensors and lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynmoe_ds.moe import MoELayer, per_slot_statistics
from dynmoe_ds.routing import RoutingRecords


def plain_records(records: Mapping[str, RoutingRecords], layers: Mapping[str, MoELayer]) -> dict[str, Any]:
    """Records of layers as a file holds them: on the host, counted by the experts that are live."""
    return {name: _plain(record, layers[name]) for name, record in records.items()}


def _plain(record: RoutingRecords, layer: MoELayer) -> dict[str, Any]:
    slots = torch.tensor(list(layer.placement.slots_by_id.values()))
    per_slot = per_slot_statistics(layer)
    return {
        "expert_ids": list(layer.placement.live_ids),
        "tokens_per_expert": record.tokens_per_slot.cpu()[slots],
        "counts": torch.stack([record.num_tokens, record.num_assignments, record.num_unrouted]).cpu(),
        "unrouted_sum": record.unrouted_sum.cpu(),
        "statistics": {
            name: value.cpu()[slots] if name in per_slot else value.cpu() for name, value in record.statistics.items()
        },
    }


def records_of(plain: Mapping[str, Any], layers: Mapping[str, MoELayer]) -> dict[str, RoutingRecords]:
    """The inverse of `plain_records`, by the slots that the experts have in `layers`."""
    return {name: _record(of_layer, layers[name]) for name, of_layer in plain.items()}


def _record(plain: Mapping[str, Any], layer: MoELayer) -> RoutingRecords:
    device = layer.active.device
    slots = torch.tensor([layer.placement.slot_of(expert_id) for expert_id in plain["expert_ids"]])

    def spread(rows: Tensor) -> Tensor:
        value = rows.new_zeros(layer.num_slots, *rows.shape[1:])
        value[slots] = rows
        return value.to(device)

    per_slot = per_slot_statistics(layer)
    num_tokens, num_assignments, num_unrouted = plain["counts"].to(device)
    statistics = plain["statistics"].items()
    return RoutingRecords(
        tokens_per_slot=spread(plain["tokens_per_expert"]),
        num_tokens=num_tokens,
        num_assignments=num_assignments,
        num_unrouted=num_unrouted,
        unrouted_sum=plain["unrouted_sum"].to(device),
        statistics={name: spread(value) if name in per_slot else value.to(device) for name, value in statistics},
    )


def summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Plain records of several ranks, by layer; nothing of nobody."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, plain in part.items():
            total[name] = _sum(total[name], plain) if name in total else plain
    return total


def _sum(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "expert_ids": a["expert_ids"],
        **{key: a[key] + b[key] for key in ("tokens_per_expert", "counts", "unrouted_sum")},
        "statistics": {name: a["statistics"][name] + b["statistics"][name] for name in a["statistics"]},
    }
