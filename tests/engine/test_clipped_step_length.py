"""A clipped step of SGD is exactly as long as asked, experts of all ranks included; another model is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import dynmoe_ds as dm
from dynmoe_ds.errors import DivergenceError
from tests.helpers.models import TinyModel, batch, deepspeed_config, gathered, shard
from tests.helpers.spawn import run_ranks

STAGES = (0, 1, 2, 3)


def _step(rank: int, world_size: int) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for stage in STAGES:
        engine = dm.initialize(TinyModel(2), deepspeed_config(stage, kind="SGD", lr=1.0, clip=0.1))
        before = gathered(engine)
        x, y = shard(batch(0, 32), rank, world_size)
        engine.backward(100 * engine(x, 100 * y))
        engine.step()
        after = gathered(engine)
        out[stage] = float(sum((after[name] - value).square().sum() for name, value in before.items()).sqrt())
    model = TinyModel(2)
    if rank == 1:
        model.last = nn.Linear(16, 16, bias=False)
    try:
        dm.initialize(model, deepspeed_config(2))
    except DivergenceError as e:
        out["other model"] = str(e)
    return out


@pytest.fixture(scope="module")
def steps() -> dict[Any, Any]:
    return run_ranks(_step, 2)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_clipped_step_has_the_length_asked_for(steps: dict[Any, Any], stage: int) -> None:
    assert steps[stage] == pytest.approx(0.1, rel=1e-4)


def test_a_rank_with_another_model_is_refused(steps: dict[Any, Any]) -> None:
    assert "model parameters" in steps["other model"] and "rank 1" in steps["other model"]
