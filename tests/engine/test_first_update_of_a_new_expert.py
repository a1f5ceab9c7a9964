"""A fresh expert's first update is about one learning rate, late in training too, where Adam's step count is high."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Grow, Plan
from tests.helpers.models import HIDDEN, TinyModel, deepspeed_config, gathered, train
from tests.helpers.spawn import run_ranks

STEPS, LR = 20, 1e-3


def _grow_late(rank: int, world_size: int) -> dict[int, Any]:
    """The step straight after growth. With these betas a second moment of 0 would make it sqrt(20) = 4.5 times lr."""
    row = torch.linspace(-1, 1, HIDDEN, dtype=torch.float64)
    out = {}
    for stage in (0, 1, 2, 3):
        config = deepspeed_config(stage, lr=LR)
        config["optimizer"]["params"] |= {"betas": [0.0, 0.999], "weight_decay": 0.0}
        engine = dm.initialize(TinyModel(2), config, dm.AdaptationConfig(1000, 1, seeding="fresh"))
        train(engine, range(STEPS), rank, world_size)
        grow = Grow(layer="moe.0", expert_id=4, slot=5, gate_row=row / row.norm(), seeding="fresh", parent_id=None)
        engine.apply_plan(Plan(items=(grow,)))
        grown = gathered(engine)
        train(engine, range(STEPS, STEPS + 1), rank, world_size)
        out[stage] = {
            name: float((value - grown[name]).square().mean().sqrt())
            for name, value in gathered(engine).items()
            if name in ("moe.0.experts.w1[4]", "moe.0.experts.w2[4]", "moe.0.router.weight[4]")
        }
    return out


@pytest.fixture(scope="module")
def updates() -> dict[int, Any]:
    return run_ranks(_grow_late, 2)[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_update_of_a_fresh_expert_is_about_one_learning_rate(updates: dict[int, Any], stage: int) -> None:
    assert len(updates[stage]) == 3
    for name, update in updates[stage].items():
        assert 0.1 * LR < update < 2.5 * LR, (name, update / LR)
