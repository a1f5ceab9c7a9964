"""Controllers of routers under the engine: the same state on all ranks, one update per optimiser step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, batch, deepspeed_config, gathered, shard, train
from tests.helpers.spawn import run_ranks

STEPS, ACCUMULATE = 4, 2
ROUTERS: dict[str, Any] = {
    "top_p": dm.TopPConfig(budget=dm.BudgetConfig(target_k=1.5), bias_update_speed=0.01),
    "top_p, one budget": dm.TopPConfig(budget=dm.BudgetConfig(target_k=2.5, scope="model")),
    "top_k": dm.TopKConfig(bias_update_speed=0.01, num_null_experts=2, null_expert="identity"),
}
CHECKPOINTS: dict[str, Any] = {"plain": None, "recomputed": partial(checkpoint, use_reentrant=False)}


def _control(rank: int, world_size: int) -> dict[Any, Any]:
    """Controllers and the records that they must come from, per step, on data that differ between ranks."""
    out: dict[Any, Any] = {}
    for name, router in ROUTERS.items():
        for how, function in CHECKPOINTS.items():
            model = TinyModel(1, num_experts=4, num_slots=6, router=router, checkpoint=function)
            engine = dm.initialize(model, deepspeed_config(2, accumulate=ACCUMULATE))
            steps = []
            for step in range(STEPS):
                for micro in range(ACCUMULATE):
                    tensors = batch(ACCUMULATE * step + micro, 48)
                    engine.backward(engine(*shard(tensors, rank, world_size)))
                    engine.step()
                engine.eval()
                with torch.no_grad():
                    engine(*batch(99, 16))
                engine.train()
                records = engine.take_records()
                layers = {n: m for n, m in engine.module.named_modules() if isinstance(m, dm.MoELayer)}
                state = {n: {k: b.clone() for k, b in m.router.named_buffers()} for n, m in layers.items()}
                live = {n: m.active.clone() for n, m in layers.items()}
                steps.append({"state": state, "records": records, "live": live})
            out[name, how] = steps
    return out


@pytest.fixture(scope="module")
def controlled() -> list[dict[Any, Any]]:
    return run_ranks(_control, 2, timeout_s=120)


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("name", ROUTERS)
def test_controllers_are_equal_on_all_ranks(controlled: list[dict[Any, Any]], name: str, how: str) -> None:
    for mine, others in zip(controlled[0][name, how], controlled[1][name, how], strict=True):
        for layer, state in mine["state"].items():
            assert state, "no controller"
            for key, value in state.items():
                assert torch.equal(value, others["state"][layer][key]), (layer, key)


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("name", ["top_p", "top_p, one budget"])
def test_a_budget_takes_in_every_optimiser_step_once(controlled: list[dict[Any, Any]], name: str, how: str) -> None:
    config = ROUTERS[name].budget
    error_sum: dict[str, float] = dict.fromkeys(("moe.0", "moe.1"), 0.0)
    for number, step in enumerate(controlled[0][name, how], 1):
        # Both ranks' tokens of all micro steps; not those of evaluation and recomputation.
        assert int(step["records"]["moe.0"].num_tokens) == 48 * ACCUMULATE
        mean_k = {layer: record.mean_k for layer, record in step["records"].items()}
        if config.scope == "model":
            mean_k = dict.fromkeys(mean_k, sum(mean_k.values()) / 2)
        for layer, state in step["state"].items():
            error = (mean_k[layer] - config.target_k) / 4
            error_sum[layer] += error
            assert int(state["budget.num_updates"]) == number
            assert float(state["budget.error_sum"]) == pytest.approx(error_sum[layer], abs=1e-12)
            assert float(state["budget.control"]) == pytest.approx(error + error_sum[layer], abs=1e-12)
    if config.scope == "layer":
        assert error_sum["moe.0"] != error_sum["moe.1"]


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("name", ["top_p", "top_k"])
def test_a_bias_takes_in_every_optimiser_step_once(controlled: list[dict[Any, Any]], name: str, how: str) -> None:
    bias = {layer: torch.zeros(6) for layer in ("moe.0", "moe.1")}
    for step in controlled[0][name, how]:
        for layer, state in step["state"].items():
            live, load = step["live"][layer], step["records"][layer].tokens_per_slot.double()
            bias[layer] += torch.where(live, 0.01 * torch.sign(load[live].mean() - load), 0.0).float()
            torch.testing.assert_close(state["selection_bias"], bias[layer])
            assert bias[layer].any()


@pytest.mark.parametrize("name", ROUTERS)
def test_recomputation_changes_nothing(controlled: list[dict[Any, Any]], name: str) -> None:
    for plain, recomputed in zip(controlled[0][name, "plain"], controlled[0][name, "recomputed"], strict=True):
        for layer, state in plain["state"].items():
            assert all(torch.equal(value, recomputed["state"][layer][key]) for key, value in state.items()), layer


# The load-balance loss is one of a rank's tokens, as in all public systems; without it layouts are equal.
EQUAL: dict[str, Any] = {
    "top_k, identity": dm.TopKConfig(
        load_balance_weight=0.0, z_loss_weight=0.01, num_null_experts=2, null_expert="identity", bias_update_speed=0.01
    ),
    "top_p, identity": dm.TopPConfig(
        load_balance_weight=0.0, num_null_experts=2, null_expert="identity", budget=dm.BudgetConfig(target_k=1.5)
    ),
    "top_p, zero": dm.TopPConfig(load_balance_weight=0.0, num_null_experts=2, renormalize=True, p=0.6),
}


def _train(rank: int, world_size: int, ep_size: int) -> dict[Any, Any]:
    out = {}
    for name, router in EQUAL.items():
        for stage in (1, 3):
            engine = dm.initialize(TinyModel(ep_size, router=router), deepspeed_config(stage))
            losses = train(engine, range(4), rank, world_size)
            record = engine.take_records()["moe.0"]
            buffers = {key: buffer.clone() for key, buffer in engine.module.moe[1].router.named_buffers()}
            out[name, stage] = losses, record, gathered(engine), buffers
    return out


@pytest.fixture(scope="module")
def one_rank() -> dict[Any, Any]:
    return run_ranks(_train, 1, 1)[0]


def test_two_ranks_with_null_experts_train_like_one(one_rank: dict[Any, Any]) -> None:
    two_ranks = run_ranks(_train, 2, 2)[0]
    for key, (losses, record, weights, buffers) in one_rank.items():
        actual = two_ranks[key]
        assert actual[0] == pytest.approx(losses, abs=5e-6), key
        assert torch.equal(actual[1].tokens_per_slot, record.tokens_per_slot), key
        assert actual[2].keys() == weights.keys(), key
        for name, weight in weights.items():
            assert (actual[2][name] - weight).abs().max().item() <= 5e-6, (key, name)
        for name, buffer in buffers.items():
            torch.testing.assert_close(actual[3][name], buffer, msg=f"{key} {name}")


@pytest.mark.parametrize("name", EQUAL)
def test_null_experts_were_there_and_chosen(one_rank: dict[Any, Any], name: str) -> None:
    _, record, weights, _ = one_rank[name, 1]
    assert {"moe.0.router.null_weight", "moe.1.router.null_weight"} <= weights.keys()
    assert int(record.num_unrouted) == 0
    if name.startswith("top_k"):
        assert 0 < int(record.num_assignments) < 2 * int(record.num_tokens), "no null expert among two choices"
