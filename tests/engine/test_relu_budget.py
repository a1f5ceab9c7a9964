"""`relu_budget` holds mean k in real training while every expert splits and the idle ones go; on one rank and on two.

As tests/engine/test_budgets.py, but longer: λ moves the speed at which k falls, and the warm-up alone takes 100 steps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from tests.engine.test_budgets import ByteModel, train_and_watch
from tests.helpers.models import deepspeed_config
from tests.helpers.spawn import run_ranks

STEPS, TARGET = 400, 2.0
LAST_FIFTH = slice(STEPS - STEPS // 5, STEPS)
# 4 experts until the budget has settled, then three splits of all of them: the last one at the start of the last fifth.
GROWTH = dm.AdaptationConfig(80, 25, rule="split_all", prune_below_share=0.7, first_step=160)


def _train(rank: int, world_size: int, bf16: bool) -> dict[str, Any]:
    model = ByteModel(dm.ReluConfig.budgeted(TARGET), ep_size=world_size)
    engine = dm.initialize(model, deepspeed_config(1, bf16=bf16), GROWTH)
    watched = train_and_watch(engine, STEPS, rank, world_size)
    state = {name: buffer.clone() for name, buffer in engine.module.named_buffers() if ".budget." in name}
    return watched | {"state": state}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks, bfloat16"])
def results(request: Any) -> list[dict[str, Any]]:
    """By rank; expert-parallel on two."""
    return run_ranks(_train, request.param, request.param == 2, timeout_s=240)


def test_mean_k_is_on_target_over_the_last_fifth(results: list[dict[str, Any]]) -> None:
    mean_k = results[0]["mean_k"][LAST_FIFTH]
    assert mean_k.shape == (STEPS // 5, 2)
    assert mean_k.mean(0).tolist() == pytest.approx([TARGET, TARGET], rel=0.05)


def test_layers_grew_and_were_pruned_up_to_the_last_fifth(results: list[dict[str, Any]]) -> None:
    live = results[0]["live"]
    assert [len(ids) for ids in live[0]] == [4, 4]
    for layer in range(2):
        assert len(live[-1][layer]) >= 14, "few splits: this run shows little"
        assert len(live[LAST_FIFTH.start][layer] - live[LAST_FIFTH.start - 1][layer]) >= 4
    pruned = [was - now for before, after in pairwise(live) for was, now in zip(before, after, strict=True)]
    assert sum(map(len, pruned)) >= 2


def test_the_model_learns(results: list[dict[str, Any]]) -> None:
    losses = results[0]["losses"]
    assert losses[0] > 5.0 and losses[-20:].mean() < 2.7


def test_state_is_equal_on_all_ranks_and_took_in_every_step(results: list[dict[str, Any]]) -> None:
    first = results[0]["state"]
    assert len(first) == 2 * 3
    for other in results:
        assert all(torch.equal(value, other["state"][name]) for name, value in first.items())
    for layer in range(2):
        assert int(first[f"moe.{layer}.router.budget.num_updates"]) == STEPS
        assert first[f"moe.{layer}.router.budget.error_sum"].dtype == torch.float64
