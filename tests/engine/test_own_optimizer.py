"""An optimiser object, or groups of one's own, train like the optimiser in DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, deepspeed_config, train
from tests.helpers.spawn import run_ranks

STAGES = (0, 1, 2, 3)


def _train(rank: int, world_size: int) -> dict[Any, Any]:
    out = {}
    for stage in STAGES:
        for kind in ("configured", "object", "groups"):
            model, config, given = TinyModel(2, num_experts=3), deepspeed_config(stage), {}
            params = config["optimizer"]["params"]
            if kind == "object":
                given["optimizer"] = torch.optim.AdamW(model.parameters(), **params)
                del config["optimizer"]
            if kind == "groups":
                some = [p for name, p in model.named_parameters() if not name.endswith("w1")]
                others = [p for name, p in model.named_parameters() if name.endswith("w1")]
                given["model_parameters"] = [{"params": some}, {"params": others}]
            engine = dm.initialize(model, config, dm.AdaptationConfig(2, 2), **given)
            out[stage, kind] = train(engine, range(5), rank, world_size)
    return out


@pytest.fixture(scope="module")
def losses() -> dict[Any, Any]:
    return run_ranks(_train, 2)[0]


@pytest.mark.parametrize("kind", ["object", "groups"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_own_optimiser_trains_like_the_configured_one(losses: dict[Any, Any], stage: int, kind: str) -> None:
    assert losses[stage, kind] == pytest.approx(losses[stage, "configured"], abs=5e-6)
