"""Rows and entries per token against counting them for every possible choice of experts."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import pytest

from dynmoe_ds.moe import Placement
from dynmoe_ds.planning.rows import SentPerToken, sent_per_token
from tests.planning.examples import layout, shape


def choices(num_experts: int, k: float, is_exact: bool) -> list[tuple[float, set[int]]]:
    """Every set of experts a token may take, with its probability."""
    if is_exact:
        size = int(k)
        return [(1 / comb(num_experts, size), set(chosen)) for chosen in combinations(range(num_experts), size)]
    share = k / num_experts
    return [
        (share ** sum(bits) * (1 - share) ** (num_experts - sum(bits)), {e for e, bit in enumerate(bits) if bit})
        for bits in product((0, 1), repeat=num_experts)
    ]


def counted(num_experts: int, num_slots: int, k: float, is_exact: bool, ep: int, per_node: int, by_node: bool):
    """The mean over choices and source ranks of what one token sends, counted leg by leg."""
    slots = Placement.initial(num_experts, num_slots, ep).slots_by_id
    rank_of = {expert: slot // (num_slots // ep) for expert, slot in slots.items()}
    total = dict.fromkeys(("rows_within", "rows_between", "entries_within", "entries_between"), 0.0)
    for probability, chosen in choices(num_experts, k, is_exact):
        for source in range(ep):
            weight = probability / ep
            if not by_node:
                for rank in range(ep):
                    entries = sum(rank_of[e] == rank for e in chosen)
                    if entries and rank != source:
                        link = "within" if rank // per_node == source // per_node else "between"
                        total[f"rows_{link}"] += weight
                        total[f"entries_{link}"] += weight * entries
                continue
            for node in range(ep // per_node):
                on_node = [e for e in chosen if rank_of[e] // per_node == node]
                if on_node and node != source // per_node:
                    total["rows_between"] += weight
                    total["entries_between"] += weight * len(on_node)
                arrival = node * per_node + source % per_node
                for rank in range(node * per_node, (node + 1) * per_node):
                    entries = sum(rank_of[e] == rank for e in on_node)
                    if entries and rank != arrival:
                        total["rows_within"] += weight
                        total["entries_within"] += weight * entries
    return SentPerToken(**total)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize(("ep", "nodes", "by_node"), [(2, 1, False), (4, 1, False), (4, 2, False), (4, 2, True)])
@pytest.mark.parametrize(("num_experts", "num_slots", "k"), [(8, 8, 2), (6, 8, 3), (3, 8, 1), (8, 16, 5), (2, 4, 2)])
def test_every_choice_counted(num_experts, num_slots, k, is_exact, ep, nodes, by_node) -> None:
    model = shape(num_experts=num_experts, num_slots=num_slots, mean_k=float(k), is_exact_k=is_exact)
    plan = layout(num_ranks=ep, num_nodes=nodes, ep_size=ep, by_node=by_node)
    got, want = sent_per_token(model, plan), counted(num_experts, num_slots, k, is_exact, ep, ep // nodes, by_node)
    for name in SentPerToken.__dataclass_fields__:
        assert getattr(got, name) == pytest.approx(getattr(want, name), abs=1e-12), name


def test_the_notes_examples() -> None:
    """E 16, R 2, k 4: 0.450 of the rows that go per expert; k of 16 one by one."""
    model = shape(num_experts=16, num_slots=16, mean_k=4.0, is_exact_k=False)
    rows = sent_per_token(model, layout(num_ranks=2, ep_size=2)).rows_within
    assert rows / (4 * 0.5) == pytest.approx(0.450, abs=5e-4)
    exact = shape(num_experts=64, num_slots=64, mean_k=8.0)
    rows = sent_per_token(exact, layout(num_ranks=16, ep_size=16)).rows_within
    assert rows / (8 * 15 / 16) == pytest.approx(0.844, abs=5e-4)


def test_an_expert_parallel_group_within_one_of_several_nodes_sends_nothing_between_them() -> None:
    sent = sent_per_token(shape(), layout(num_ranks=8, num_nodes=2, ep_size=4))
    assert sent.rows_between == sent.entries_between == 0 and sent.rows_within > 0
