"""What is told of a model's layers and of its cost, at every log and at every evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dynmoe_ds.models import FlopCount, ParameterCount
from dynmoe_ds.moe import LayerTraffic, Placement
from dynmoe_ds.routing import mean_k_per_kind
from dynmoe_ds.telemetry import Metric
from dynmoe_ds.training.expert_loads import ExpertLoads


def kind_metrics(group: str, loads: ExpertLoads, token_kinds: Sequence[str]) -> list[Metric]:
    """Experts per token of each kind: `<group>/mean_k_per_kind/<kind>/<layer>`, and the mean over layers.

    A kind without tokens is left out. Raises: RoutingError as `mean_k_per_kind`.
    """
    found: list[Metric] = []
    per_layer = {layer: mean_k_per_kind(record) for layer, record in loads.records.items()}
    for index, kind in enumerate(token_kinds):
        of_kind = {layer: means[index] for layer, means in per_layer.items() if not math.isnan(means[index])}
        name = f"{group}/mean_k_per_kind/{kind}"
        found += [_metric(f"{name}/{layer}", mean_k) for layer, mean_k in of_kind.items()]
        if of_kind:
            found.append(_metric(name, sum(of_kind.values()) / len(of_kind)))
    return found


def cost_metrics(
    group: str,
    loads: ExpertLoads,
    placements: Mapping[str, Placement],
    parameters: ParameterCount,
    flops: FlopCount,
) -> list[Metric]:
    """What an average token of these loads cost; nothing for a model without experts, where it never changes."""
    if not loads.records:
        return []
    mean_k = loads.mean_k()
    num_live = {layer: len(placement.live_ids) for layer, placement in placements.items()}
    found = [
        _metric(f"{group}/active_parameters", parameters.active_per_token(mean_k, num_live)),
        _metric(f"{group}/forward_flops_per_token", flops.forward(mean_k)),
    ]
    if group == "moe":
        found.append(_metric("moe/training_flops_per_token", flops.training(mean_k)))
    return found


def pool_metrics(placements: Mapping[str, Placement], observables: Mapping[str, Mapping[str, float]]) -> list[Metric]:
    """The state of the layers between two steps: live experts, and the values of the routers' controllers."""
    found = [_metric(f"moe/live_experts/{layer}", len(placement.live_ids)) for layer, placement in placements.items()]
    found += [_metric(f"moe/slots/{layer}", placement.num_slots) for layer, placement in placements.items()]
    for layer, values in observables.items():
        found += [_metric(f"moe/controller/{name}/{layer}", value) for name, value in values.items()]
    return found


def rank_metrics(loads: ExpertLoads) -> list[Metric]:
    """How unevenly rows fall on the ranks of a group; nothing where one rank has all experts, or nobody has rows.

    Ranks wait for the busiest one in every layer. So for all layers together it is what the busiest ranks compute over
    what they would if each layer's rows were shared out equally.
    """
    by_layer = {layer: rows for layer, rows in loads.rows_per_rank.items() if len(rows) > 1 and any(rows)}
    if not by_layer:
        return []
    busiest = {layer: max(rows) for layer, rows in by_layer.items()}
    mean = {layer: sum(rows) / len(rows) for layer, rows in by_layer.items()}
    return [
        _metric("moe/rank_imbalance", sum(busiest.values()) / sum(mean.values())),
        *(_metric(f"moe/rank_imbalance/{layer}", busiest[layer] / mean[layer]) for layer in by_layer),
    ]


def traffic_metrics(traffic: Mapping[str, LayerTraffic], num_tokens: int) -> list[Metric]:
    """What this rank sent to others in all layers for its `num_tokens` tokens; nothing where it has all experts."""
    if not traffic:
        return []
    total = sum(traffic.values(), LayerTraffic())
    values = {
        "moe/sent_row_bytes_per_token": total.sent.row_bytes,
        "moe/least_row_bytes_per_token": int(total.least_row_bytes),
        "moe/sent_metadata_bytes_per_token": total.sent.metadata_bytes,
    }
    return [Metric(name=name, value=value / max(num_tokens, 1), reduction="mean") for name, value in values.items()]


def _metric(name: str, value: float) -> Metric:
    return Metric(name=name, value=value, reduction="last")
