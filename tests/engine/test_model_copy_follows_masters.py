"""Right after surgery the next forward's weights are the masters, rounded: at every stage, in both dtypes."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Grow, Move, Plan, Prune, Split
from tests.helpers.models import HIDDEN, TinyModel, deepspeed_config, train
from tests.helpers.spawn import run_ranks

# ZeRO stage, bfloat16, whether ZeRO-3 keeps parameters whole between steps.
CASES = [(s, b, True) for s in (0, 1, 2, 3) for b in (False, True)] + [(3, False, False), (3, True, False)]


def _operate(rank: int, world_size: int) -> dict[Any, list[str]]:
    row = torch.linspace(-1, 1, HIDDEN, dtype=torch.float64)
    out = {}
    for stage, bf16, is_kept in CASES:
        config = deepspeed_config(stage, bf16=bf16)
        if not is_kept:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engine = dm.initialize(TinyModel(2), config, dm.AdaptationConfig(1000, 1))
        train(engine, range(2), rank, world_size)
        items = [
            Grow(layer="moe.0", expert_id=4, slot=5, gate_row=row / row.norm(), seeding="fresh", parent_id=None),
            Split(layer="moe.0", parent_id=3, expert_id=5, slot=1),
            Move(layer="moe.0", expert_id=0, to_slot=7),
            Prune(layer="moe.0", expert_id=1),
        ]
        engine.apply_plan(Plan(items=tuple(items)))
        stale = []
        for name, param in engine.module.moe[0].named_parameters():
            master = engine.masters.read(param, 0, getattr(param, "ds_shape", param.shape)[0])["weight"]
            with deepspeed.zero.GatheredParameters([param], enabled=stage == 3):
                if not torch.equal(param.detach(), master.to(param.dtype)):
                    stale.append(name)
        out[stage, bf16, is_kept] = stale
    return out


@pytest.fixture(scope="module")
def stale() -> list[dict[Any, list[str]]]:
    return run_ranks(_operate, 4, timeout_s=120)


@pytest.mark.parametrize(("stage", "bf16", "is_kept"), CASES)
def test_surgery_reaches_the_weights_of_the_next_forward(stale: Any, stage: int, bf16: bool, is_kept: bool) -> None:
    assert [rank[stage, bf16, is_kept] for rank in stale] == [[]] * 4
