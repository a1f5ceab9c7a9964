"""What is told of a model's layers and of its cost, at every log and at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynmoe_ds.data import modality_of
from dynmoe_ds.models import FlopCount, ParameterCount
from dynmoe_ds.moe import LayerTraffic, Placement
from dynmoe_ds.routing import kind_totals
from dynmoe_ds.telemetry import Metric
from dynmoe_ds.training.expert_loads import ExpertLoads

_PER_KIND = "mean_k_per_kind/"


def kind_metrics(group: str, loads: ExpertLoads, token_kinds: Sequence[str]) -> list[Metric]:
    """Experts per token of each kind: `<group>/mean_k_per_kind/<kind>/<layer>`, and the mean over layers.

    Kinds of conversations about images (`modality_of`) are also taken together, every token counting once: by modality,
    `mean_k_per_modality/<image or text>`, and by what is asked, `mean_k_per_question/<kind of sample>`.
    A kind without tokens is left out. Raises: RoutingError as `kind_totals`.
    """
    found: list[Metric] = []
    totals = {layer: kind_totals(record) for layer, record in loads.records.items()}
    for name, members in _sets_of_kinds(token_kinds).items():
        mean_k: dict[str, float] = {}
        for layer, of_kinds in totals.items():
            tokens, chosen = (sum(of_kinds[index][column] for index in members) for column in (0, 1))
            if tokens:
                mean_k[layer] = chosen / tokens
        if name.startswith(_PER_KIND):
            found += [_metric(f"{group}/{name}/{layer}", value) for layer, value in mean_k.items()]
        if mean_k:
            found.append(_metric(f"{group}/{name}", sum(mean_k.values()) / len(mean_k)))
    return found


def _sets_of_kinds(token_kinds: Sequence[str]) -> dict[str, list[int]]:
    """The indices of the kinds that are counted together, by what a metric calls them."""
    sets = {f"{_PER_KIND}{kind}": [index] for index, kind in enumerate(token_kinds)}
    parts = [modality_of(kind) for kind in token_kinds]
    if None in parts:  # of data without images
        return sets
    for place, name in enumerate(("mean_k_per_modality", "mean_k_per_question")):
        for index, part in enumerate(parts):
            if part is not None and part[place] is not None:
                sets.setdefault(f"{name}/{part[place]}", []).append(index)
    return sets


def cost_metrics(
    group: str,
    loads: ExpertLoads,
    placements: Mapping[str, Placement],
    parameters: ParameterCount,
    flops: FlopCount,
) -> list[Metric]:
    """What an average token of these loads cost.

    A model without experts, where it never changes, is told of at evaluations alone; one with experts that saw no
    token, not at all.
    """
    has_experts = bool(parameters.per_expert)
    if not loads.records and (has_experts or group == "moe"):
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
