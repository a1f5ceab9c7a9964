"""At ZeRO-3, growth reaches the forward pass also where parameters are not kept gathered between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, deepspeed_config, gathered, train
from tests.helpers.spawn import run_ranks


def _grow(rank: int, world_size: int) -> dict[int, Any]:
    out = {}
    for threshold in (0, 100_000):  # nothing is kept whole, everything is (DeepSpeed's default)
        config = deepspeed_config(3)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
        engine = dm.initialize(TinyModel(2, num_experts=3), config, dm.AdaptationConfig(2, 2))
        losses = train(engine, range(5), rank, world_size)
        out[threshold] = {"losses": losses, "weights": gathered(engine)}
    return out


def test_growth_is_the_same_with_and_without_persisted_parameters() -> None:
    split, kept = (run := run_ranks(_grow, 2)[0])[0], run[100_000]
    assert any("[3]" in name for name in kept["weights"]), "nothing grew"
    assert split["losses"] == pytest.approx(kept["losses"], abs=1e-7)
    assert all(torch.equal(split["weights"][name], value) for name, value in kept["weights"].items())
