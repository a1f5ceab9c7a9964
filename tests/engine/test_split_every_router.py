"""Every registered router grows by splits: experts are born, and its promises about k hold afterwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.routing import router_config, router_names
from tests.helpers.models import TinyModel, batch, deepspeed_config, train
from tests.helpers.spawn import run_ranks


def _run(rank: int, world_size: int) -> dict[str, Any]:
    out = {}
    for name in router_names():
        adaptation = dm.AdaptationConfig(2, 1, rule="split_all", last_growth_step=4, split_reset_share=0.5)
        engine = dm.initialize(TinyModel(2, num_experts=3, router=name), deepspeed_config(2), adaptation)
        losses = train(engine, range(6), rank, world_size)
        layer = engine.module.moe[0].eval()
        mask = layer.router(batch(0, 64)[0], layer.active, None).mask
        out[name] = {
            "losses": losses,
            "births": [len(event.layers["moe.0"]["grown"]) for event in engine.take_events()],
            "k": mask.sum(1),
            "load": mask.sum(0),
            "active": layer.active.clone(),
            "buffers": {key: value.clone() for key, value in layer.router.named_buffers()},
            "rows": layer.router.weight.detach().clone(),
        }
    return out


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_ranks(_run, 2, timeout_s=240)


@pytest.mark.parametrize("name", router_names())
def test_experts_are_born_and_tokens_are_served_as_promised(runs: list[dict[str, Any]], name: str) -> None:
    result, config = runs[0][name], router_config(name)
    assert all(math.isfinite(loss) for loss in result["losses"])
    # 3 experts, then 6, then as many as there are slots, but for those that are pruned because nobody chose them.
    assert result["births"][0] == 3 and result["births"][1] >= 2 and sum(result["births"][2:]) == 0
    num_live = int(result["active"].sum())
    bounds = [getattr(config, key) for key in ("k", "k_max") if getattr(config, key, None) is not None]
    assert int(result["k"].max()) <= min(num_live, *bounds, 8)
    if not config.may_leave_unrouted:
        assert int(result["k"].min()) >= 1
    assert not result["load"][~result["active"]].any()
    for key, value in result["buffers"].items():
        assert torch.isfinite(value).all(), key


@pytest.mark.parametrize("name", router_names())
def test_ranks_stay_alike(runs: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in runs)
    assert torch.equal(first["active"], second["active"]) and torch.equal(first["rows"], second["rows"])
    assert all(torch.equal(first["buffers"][key], value) for key, value in second["buffers"].items())
