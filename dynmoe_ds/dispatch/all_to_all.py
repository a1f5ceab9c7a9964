"""Dispatch between the ranks of an expert-parallel group: each token goes once to every rank that it needs.

The rank of the experts forms the weighted sum of their outputs, and one row goes back. The gradients of the weights,
which only that rank can know, come back as scalars. With two groups, between nodes and within one, a row goes once to
each node, to the rank at the sender's own position there, and from it to the node's ranks: the same leg twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dynmoe_ds.dispatch.local import run_slots
from dynmoe_ds.dispatch.plan import RowMoves, chosen, plan_dispatch
from dynmoe_ds.dispatch.slot_bits import pack_bits, unpack_bits
from dynmoe_ds.distributed import Flight, Parcel, Splits, Traffic, exchange_counts
from dynmoe_ds.experts import Experts
from dynmoe_ds.routing import Routing


def run_all_to_all(
    hidden: Tensor,
    routing: Routing,
    experts: Experts,
    groups: Sequence[ProcessGroup],
    *,
    chunks: int = 1,
    beside: Callable[[], Tensor] | None = None,
    traffic: Traffic | None = None,
) -> Tensor:
    """The experts' weighted outputs [T, D], summed per token, for this rank's hidden [T, D].

    groups: the expert-parallel group; or its ranks at this one's position in all nodes, and those of this node. Slots
    are sorted by node, and by rank within one. chunks: parts of the tokens, of which one travels while experts compute
    another. beside: gives a further term [T, D] of the result, computed while rows travel. traffic: counts the bytes.

    Collective: every rank of the groups, also with zero tokens, with equally many chunks. One exchange of counts per
    group; per chunk and group then rows, their slots and weights to the experts, and rows back. The backward pass
    mirrors the last two.
    """
    sizes = [len(mask) for mask in routing.mask.tensor_split(chunks)]
    masks = routing.mask.split(sizes)
    parts = zip(
        hidden.split(sizes), masks, routing.weights.split(sizes), _agree_on_legs(masks, groups, traffic), strict=True
    )
    journeys = [
        _travel(rows, mask, _entries(weights, mask, sum(legs[0].entries.sent)), legs, experts, traffic)
        for rows, mask, weights, legs in parts
    ]
    return _side_by_side(journeys, beside)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Leg:
    """A part of the way to the experts: rows of this rank and entries (chosen slots of these rows) over a group."""

    group: ProcessGroup
    rows: Splits
    entries: Splits


def _travel(
    hidden: Tensor, mask: Tensor, weights: Tensor, legs: Sequence[_Leg], experts: Experts, traffic: Traffic | None
) -> Generator[None, None, Tensor]:
    """The weighted sums [T, D] of hidden [T, D]; stops wherever rows are under way, for other work to be done.

    mask [T, n·s]: the slots of each token, those of the first leg's ranks one after another. weights [N]: of the
    entries, by token and by slot.
    """
    if not legs:
        plan = plan_dispatch(mask, len(weights))
        return run_slots(hidden, plan, weights.index_select(0, plan.entry_index), experts)
    leg, *rest = legs
    num_tokens, num_ranks = len(mask), leg.group.size()
    by_rank = mask.view(num_tokens, num_ranks, mask.shape[1] // num_ranks)
    plan = plan_dispatch(by_rank.any(2), sum(leg.rows.sent))
    slots = by_rank[plan.token_index, _rank_of_rows(plan.rows_per_slot, plan.token_index)]
    moves = RowMoves(plan)
    flight = Flight(
        [
            Parcel(tensor=moves.gather(hidden), splits=leg.rows),
            Parcel(tensor=pack_bits(slots), splits=leg.rows, freight="metadata"),
            Parcel(
                tensor=weights.index_select(0, _entries_by_rank(by_rank, len(weights))),
                splits=leg.entries,
                freight="metadata",
            ),
        ],
        leg.group,
        traffic,
    )
    yield
    hidden, bits, weights = flight.wait()
    sums = yield from _travel(hidden, unpack_bits(bits, slots.shape[1]), weights, rest, experts, traffic)
    flight = Flight([Parcel(tensor=sums, splits=leg.rows.reversed())], leg.group, traffic)
    yield
    (sums,) = flight.wait()
    return moves.sum(sums)


def _entries(weights: Tensor, mask: Tensor, num_entries: int) -> Tensor:
    """The weights [N] of the chosen slots in weights [T, S], by token and by slot within one."""
    return weights.reshape(-1).index_select(0, chosen(mask.reshape(-1), num_entries))


def _rank_of_rows(rows_per_rank: Tensor, rows: Tensor) -> Tensor:
    """Destination [P] of each of the `rows` [P], which are sorted by it."""
    ranks = torch.arange(len(rows_per_rank), device=rows.device)
    return ranks.repeat_interleave(rows_per_rank, output_size=len(rows))


def _entries_by_rank(by_rank: Tensor, num_entries: int) -> Tensor:
    """The order [N] by rank, token and slot of the entries of by_rank [T, n, s] bool, which come by token and slot."""
    position = (by_rank.reshape(-1).cumsum(0) - 1).view_as(by_rank)
    entries = chosen(by_rank.transpose(0, 1).reshape(-1), num_entries)
    return position.transpose(0, 1).reshape(-1).index_select(0, entries)


def _agree_on_legs(
    masks: Sequence[Tensor], groups: Sequence[ProcessGroup], traffic: Traffic | None
) -> list[list[_Leg]]:
    """The legs of each chunk, whose slots are masks [T, S]. One wait for the device: split sizes are the host's.

    The first group's ranks are told how many rows they get and also how many of these go on to each rank of the next
    group, so that the counts of all legs are known before any row has left.
    """
    sizes = [group.size() for group in groups]
    # Per leg the rows by path, [C, n_1, ..., n_leg]; at last the entries by the whole path.
    counts = []
    for leg in range(1, len(sizes) + 1):
        counts.append(torch.stack([m.view(len(m), *sizes[:leg], _rest(m, sizes[:leg])).any(-1).sum(0) for m in masks]))
    counts.append(torch.stack([m.view(len(m), *sizes, _rest(m, sizes)).sum((0, -1)) for m in masks]))

    numbers = []
    for group in groups:
        sent = [count.transpose(0, 1) for count in counts]  # [n, C, ...]
        widths = [count[0].numel() for count in sent]
        told = exchange_counts(torch.cat([count.flatten(1) for count in sent], 1), group, traffic).split(widths, 1)
        received = [part.view(count.shape) for part, count in zip(told, sent, strict=True)]
        entries = (count[-1].reshape(*count[0].shape, -1).sum(-1) for count in (sent, received))
        numbers += [sent[0], received[0], *entries]  # each [n, C]
        counts = [count.sum(0) for count in received[1:]]  # of all sources together: what this rank sends on

    host = iter(torch.cat([number.T.flatten() for number in numbers]).tolist())
    legs: list[list[_Leg]] = [[] for _ in masks]
    for group, size in zip(groups, sizes, strict=True):
        rows_sent, rows_received, entries_sent, entries_received = (
            [[next(host) for _ in range(size)] for _ in masks] for _ in range(4)
        )
        for chunk in range(len(masks)):
            rows = Splits(sent=rows_sent[chunk], received=rows_received[chunk])
            chosen_slots = Splits(sent=entries_sent[chunk], received=entries_received[chunk])
            legs[chunk].append(_Leg(group=group, rows=rows, entries=chosen_slots))
    return legs


def _rest(mask: Tensor, sizes: Sequence[int]) -> int:
    """Slots of mask [T, S] per rank at the end of a path over groups of these sizes."""
    return mask.shape[1] // math.prod(sizes)


def _side_by_side(journeys: Sequence[Generator[None, None, Tensor]], beside: Callable[[], Tensor] | None) -> Tensor:
    """The results of all journeys, one after another, and the term computed beside them.

    Each is taken on to its next stop in turn, so that one computes while the rows of the others are under way.
    """
    results: dict[int, Tensor] = {}
    extra: Tensor | None = None
    is_first_round = True
    while len(results) < len(journeys):
        for i, journey in enumerate(journeys):
            if i not in results:
                try:
                    next(journey)
                except StopIteration as end:
                    results[i] = end.value
        if is_first_round and beside is not None:
            extra = beside()
        is_first_round = False
    total = results[0] if len(results) == 1 else torch.cat([results[i] for i in range(len(journeys))])
    return total if extra is None else total + extra
