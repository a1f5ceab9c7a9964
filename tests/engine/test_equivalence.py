"""Training on any layout equals training on one rank: losses, gradient norms, weights, pools."""

from __future__ import annotations

from typing import Any

import pytest

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, deepspeed_config, gathered, train
from tests.helpers.spawn import run_ranks

STAGES = (0, 1, 2, 3)
# SGD shows errors of scale that Adam hides; Adam shows errors in its state. Clipping is tight enough to act.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd, clipped, accumulated": {"kind": "SGD", "lr": 0.1, "clip": 0.1, "accumulate": 2},
    "bf16": {"kind": "SGD", "lr": 0.1, "clip": 0.1, "bf16": True},
}
LAYOUTS = {"EP 2": (2, 2), "EP 2 x EDP 2": (4, 2), "EP 4": (4, 4), "EDP 2": (2, 1)}
# How rows travel in the runs whose pools grow; in the others each token goes straight to the ranks that it needs.
DISPATCH = {"EP 2 x EDP 2": dm.DispatchConfig(chunks=2), "EP 4": dm.DispatchConfig(chunks=2, ranks_per_node=2)}
FLOAT32 = 5e-6
# One bfloat16 rounding of a value near 1 is 4e-3; sums of other layouts round elsewhere.
BF16_LOSS, BF16_WEIGHT = 1e-3, 4e-3


def _train_all(
    rank: int, world_size: int, ep_size: int, experts_grow: bool, dispatch: dm.DispatchConfig | None = None
) -> dict[Any, Any]:
    results = {}
    adaptation = dm.AdaptationConfig(2, 2) if experts_grow else None
    for stage in STAGES:
        for name, setting in SETTINGS.items():
            model = TinyModel(ep_size, num_experts=3 if experts_grow else 8)
            engine = dm.initialize(model, deepspeed_config(stage, **setting), adaptation, dispatch=dispatch)
            losses = train(engine, range(5), rank, world_size, accumulate=setting.get("accumulate", 1))
            results[stage, name] = {
                "losses": losses,
                "norm": engine.gradient_norm(),
                "weights": gathered(engine),
                "pools": {n: p.expert_ids for n, p in engine.placements().items()},
                "live": {n: p.live_ids for n, p in engine.placements().items()},
            }
    return results


@pytest.fixture(scope="module")
def one_rank() -> dict[bool, Any]:
    return {grow: run_ranks(_train_all, 1, 1, grow, timeout_s=120)[0] for grow in (False, True)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("experts_grow", [False, True], ids=["fixed pool", "growing pool"])
def test_a_layout_trains_like_one_rank(layout: str, experts_grow: bool, one_rank: dict[bool, Any]) -> None:
    world_size, ep_size = LAYOUTS[layout]
    dispatch = DISPATCH.get(layout) if experts_grow else None
    ranks = run_ranks(_train_all, world_size, ep_size, experts_grow, dispatch, timeout_s=240)
    for key, expected in one_rank[experts_grow].items():
        stage, setting = key
        loss_tolerance, weight_tolerance = (BF16_LOSS, BF16_WEIGHT) if setting == "bf16" else (FLOAT32, FLOAT32)
        actual = ranks[0][key]
        assert actual["losses"] == pytest.approx(expected["losses"], abs=loss_tolerance), key
        assert actual["norm"] == pytest.approx(expected["norm"], rel=loss_tolerance * 10), key
        assert actual["weights"].keys() == expected["weights"].keys(), key
        for name, weight in expected["weights"].items():
            error = (actual["weights"][name] - weight).abs().max().item()
            assert error <= weight_tolerance, (stage, setting, name, error)
        # Ranks see different data, and yet the pools must be the same everywhere.
        assert all(rank[key]["pools"] == actual["pools"] for rank in ranks), key
        assert actual["live"] == expected["live"], key


def test_the_growing_runs_did_grow(one_rank: dict[bool, Any]) -> None:
    for key, result in one_rank[True].items():
        assert all(len(ids) > 3 for ids in result["live"].values()), key


def test_clipping_did_act(one_rank: dict[bool, Any]) -> None:
    assert one_rank[False][2, "bf16"]["norm"] > 0.1


def _recommended(rank: int, world_size: int, ep_size: int) -> list[float]:
    # The load-balance loss is one of this rank's tokens, as in all public systems; without it the layouts are equal.
    config = dm.TopAnyConfig(**{**_fields(dm.TopAnyConfig.recommended()), "load_balance_weight": 0.0})
    engine = dm.initialize(TinyModel(ep_size, router=config, expert="gelu"), deepspeed_config(2))
    return train(engine, range(4), rank, world_size)


def _fields(config: dm.TopAnyConfig) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)


def test_softmax_weights_and_gelu_experts_train_alike_on_two_ranks() -> None:
    expected = run_ranks(_recommended, 1, 1)[0]
    assert run_ranks(_recommended, 2, 2)[0] == pytest.approx(expected, abs=FLOAT32)
