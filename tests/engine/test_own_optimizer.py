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


def _forms(rank: int, world_size: int, options: dict[str, Any]) -> list[Any]:
    engine = dm.initialize(TinyModel(1, num_experts=3), deepspeed_config(2, **options))
    optimizer = engine.optimizer.optimizer
    return [type(optimizer).__name__, *(optimizer.defaults.get(name) for name in ("fused", "foreach"))]


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, ["AdamW", True, None]),
        ({"fused": False}, ["AdamW", False, None]),
        ({"foreach": True}, ["AdamW", None, True]),
        ({"kind": "SGD"}, ["SGD", None, None]),
    ],
    ids=str,
)
def test_adam_is_torchs_fused_one_unless_another_form_is_asked_for(options: dict[str, Any], form: list[Any]) -> None:
    assert run_ranks(_forms, 1, options) == [form]


@pytest.fixture(scope="module")
def losses() -> dict[Any, Any]:
    return run_ranks(_train, 2)[0]


@pytest.mark.parametrize("kind", ["object", "groups"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_own_optimiser_trains_like_the_configured_one(losses: dict[Any, Any], stage: int, kind: str) -> None:
    assert losses[stage, kind] == pytest.approx(losses[stage, "configured"], abs=5e-6)
