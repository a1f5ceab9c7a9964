"""Rebalancing: which experts change ranks, so that the ranks of an expert-parallel group have equal work. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.adaptation.plan import Move
from dynmoe_ds.adaptation.rules import busiest_first
from dynmoe_ds.moe import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """A move, and the tokens by which it relieves the busier of its two ranks, less what carrying experts costs."""

    move: Move
    gain: float


def rebalancing_moves(
    layer: str, load: Mapping[int, int], placement: Placement, config: AdaptationConfig
) -> list[Move]:
    """The moves that even out a layer's ranks, in order; none on one rank or without `config.rebalance_above`.

    load: tokens of every live expert by id. While the imbalance is above the threshold, the busiest rank gives an
    expert to a free slot of a less loaded rank, or exchanges it for a smaller one there: the step that gains most, as
    long as one gains anything. Of equal gains the step that carries fewer experts is taken, then that of the largest
    expert, then the least loaded rank; of equal loads the oldest expert and the lowest rank and slot.

    Every step replaces a load of the busiest rank's size by two smaller ones, so it ends.
    Source: the largest-first packing of EPLB (github.com/deepseek-ai/EPLB), without replicas; ours changes the packing
    that there is instead of making a new one, for few experts to be carried (docs/decisions.md).
    """
    moves: list[Move] = []
    while config.rebalance_above is not None and imbalance(load, placement) > config.rebalance_above:
        steps = _steps(layer, load, placement, config.rebalance_cost)
        best = min(steps, key=lambda step: (-step.gain, step.move.exchange_with is not None), default=None)
        if best is None:
            break
        moves.append(best.move)
        placement = best.move.apply(placement)
    return moves


def rank_loads(load: Mapping[int, int], placement: Placement) -> list[int]:
    """Tokens of every rank of the expert-parallel group; `load` as for `rebalancing_moves`."""
    loads = [0] * placement.ep_size
    for expert_id, slot in placement.slots_by_id.items():
        loads[placement.rank_of(slot)] += load[expert_id]
    return loads


def imbalance(load: Mapping[int, int], placement: Placement) -> float:
    """Load of the busiest rank over the mean load: 1 for equal loads, `ep_size` if one has all; 1 without tokens."""
    loads = rank_loads(load, placement)
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def _steps(layer: str, load: Mapping[int, int], placement: Placement, cost_share: float) -> Iterator[_Step]:
    """What the busiest rank could gain by, the largest expert first and for each the least loaded rank first."""
    loads = rank_loads(load, placement)
    cost = cost_share * sum(loads) / len(loads)
    ranks = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
    busiest = min(range(len(loads)), key=lambda rank: (-loads[rank], rank))
    slots = placement.slots_by_id
    experts: list[list[int]] = [[] for _ in loads]
    for expert_id in busiest_first({expert_id: load[expert_id] for expert_id in slots}):
        experts[placement.rank_of(slots[expert_id])].append(expert_id)
    free = {placement.rank_of(slot): slot for slot in reversed(placement.free_slots)}

    for expert_id in experts[busiest]:
        for rank in ranks:
            gap = loads[busiest] - loads[rank]
            places = [(free[rank], None)] if rank in free else []
            for to_slot, other_id in places + [(slots[id_], id_) for id_ in experts[rank]]:
                shifted = load[expert_id] - (0 if other_id is None else load[other_id])
                # The busier of the two afterwards has what the one gave less, or what the other took more.
                gain = min(shifted, gap - shifted) - cost * (1 if other_id is None else 2)
                if gain > 0:  # never on the busiest rank itself, where the gap is 0
                    move = Move(layer=layer, expert_id=expert_id, to_slot=to_slot, exchange_with=other_id)
                    yield _Step(move=move, gain=gain)
