"""Experts on several ranks give what one rank gives, forwards and backwards, without an engine."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.dispatch.all_to_all import _orders
from tests.helpers.reference import assert_near, randomise
from tests.helpers.spawn import run_ranks

EXPERTS, SLOTS = 6, 8

# Tokens of each rank (of as many as there are), and thresholds by expert id that replace the random ones.
CASES: dict[str, tuple[tuple[int, ...], dict[int, float]]] = {
    "uneven": ((11, 3, 7, 20), {}),
    "a rank without tokens": ((9, 0, 4, 0), {}),
    "no tokens at all": ((0, 0, 0, 0), {}),
    "one token": ((1, 0, 0, 0), {}),
    "an expert without rows": ((11, 3, 7, 5), {2: 2.0}),
    "nobody routed": ((5, 3, 2, 1), dict.fromkeys(range(EXPERTS), 2.0)),
    "everything to the first rank": ((5, 8, 3, 2), {0: -2.0} | dict.fromkeys(range(1, EXPERTS), 2.0)),
    "everything to the last rank": ((5, 0, 3, 2), {EXPERTS - 1: -2.0} | dict.fromkeys(range(EXPERTS - 1), 2.0)),
    "everything to everybody": ((5, 6, 0, 2), dict.fromkeys(range(EXPERTS), -2.0)),
}


def make(case: str, ep_size: int, dtype: torch.dtype, expert: str, router: str) -> dm.MoELayer:
    layer = dm.MoELayer(
        hidden_size=8,
        ffn_hidden_size=16,
        num_experts=EXPERTS,
        num_slots=SLOTS,
        ep_size=ep_size,
        expert=expert,
        router=router,
        seed=0,
    )
    randomise(layer.to(dtype))
    with torch.no_grad():
        for expert_id, threshold in CASES[case][1].items():
            layer.router.threshold[layer.placement.slot_of(expert_id)] = threshold
    return layer


def run(layer: dm.MoELayer, x: Tensor, recompute: bool = False) -> dict[str, Tensor]:
    """Output and gradients of one rank's tokens."""
    x = x.clone().requires_grad_()
    with dm.StepLedger() as ledger:
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    layer.zero_grad()  # sets to None, so the gradients of the last run stay as they are
    (y.square().sum() + ledger.aux_loss()).backward()
    grads = {name: param.grad for name, param in layer.named_parameters()}
    assert all(grad is not None for grad in (x.grad, *grads.values()))
    return {"y": y.detach(), "x": x.grad} | grads


def _equal_to_one_rank(rank: int, world_size: int, ep_size: int, cases: list[tuple[str, Any, str, str]]) -> list[int]:
    num_rows = []
    for case, dtype, expert, router in cases:
        counts = CASES[case][0][:world_size]
        hidden = torch.randn(sum(counts), 8, generator=torch.Generator().manual_seed(3)).to(dtype).split(counts)
        layer = make(case, ep_size, dtype, expert, router)
        layer.experts.register_forward_pre_hook(lambda _, args: num_rows.append(len(args[0])))
        got = run(layer, hidden[rank])

        alone = make(case, 1, dtype, expert, router)
        first = rank // ep_size * ep_size
        by_rank = {r: run(alone, hidden[r]) for r in range(first, first + ep_size)}
        for name, value in got.items():
            if name.startswith("experts."):  # gradients of all tokens of the group, of the slots here
                parts = [result[name].double() for result in by_rank.values()]
                want = sum(parts)[layer.local_slots.start : layer.local_slots.stop]
            else:
                want = by_rank[rank][name]
            assert_near(value, want, what=f"{name}: {case}, {dtype}, {expert}, {router}")

        for recompute in (False, True):
            again = run(layer, hidden[rank], recompute)
            assert all(torch.equal(again[name], value) for name, value in got.items()), f"not repeatable, {recompute=}"
    return num_rows


LAYOUTS = {"EP 2": (2, 2), "EP 4": (4, 4), "EP 2 x 2": (4, 2)}


@pytest.mark.parametrize(("world_size", "ep_size"), LAYOUTS.values(), ids=LAYOUTS)
def test_expert_parallel_equals_one_rank(world_size, ep_size):
    cases = [(case, torch.float64, "swiglu", "top_any") for case in CASES]
    cases += [(case, torch.bfloat16, "gelu", "top_any_recommended") for case in CASES]
    cases += [("uneven", torch.float32, expert, "top_any_recommended") for expert in ("swiglu", "gelu")]
    cases += [("a rank without tokens", torch.float32, "swiglu", "top_any_authors_code")]
    rows = run_ranks(_equal_to_one_rank, world_size, ep_size, cases)
    # The cases do what their names say.
    counts = CASES["everything to the first rank"][0][:ep_size]
    at = 4 * list(CASES).index("everything to the first rank")  # of each case three runs and a recomputation
    assert [r[at] for r in rows[:ep_size]] == [sum(counts)] + [0] * (ep_size - 1)


def _groups_without_communication_between_them(rank: int, world_size: int) -> int:
    """Replicas of an expert-parallel group may call a different number of times: no world collective in forward."""
    layer = make("uneven", 2, torch.float32, "swiglu", "top_any")
    layer(torch.ones(1, 8))  # joins the group, over all ranks
    for _ in range(1 + rank // 2):
        layer(torch.ones(rank, 8))
    assert dist.get_world_size(layer.ep_group) == 2
    return 1 + rank // 2


def test_replicas_may_call_a_different_number_of_times():
    assert run_ranks(_groups_without_communication_between_them, 4) == [1, 1, 2, 2]


def test_orders_between_source_rank_and_slot():
    # Two source ranks and three slots here: rank 0 sends 2, 0, 1 rows, rank 1 sends 1, 2, 0.
    received = torch.tensor([[2, 0, 1], [1, 2, 0]])
    rows = ["0a", "0a'", "0c", "1a", "1b", "1b'"]
    by_slot, by_source = _orders(received, num_rows=6)
    sorted_rows = [rows[i] for i in by_slot]
    assert sorted_rows == ["0a", "0a'", "1a", "1b", "1b'", "0c"]
    assert [sorted_rows[i] for i in by_source] == rows
