"""At ZeRO-3, which empties parameters between their uses, gate scores in C++ train like torch's."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

import dynmoe_ds as dm
import dynmoe_kernels as kernels
from dynmoe_ds.routing import logits
from tests.helpers.models import TinyModel, deepspeed_config, gathered, train
from tests.helpers.spawn import run_ranks


def _train(rank: int, world_size: int, router: str) -> dict[str, Any]:
    """With each form, how often C++ computed a gradient, the losses and the weights."""
    config = deepspeed_config(3)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    found = {}
    for choice in ("auto", "torch"):
        with (
            kernels.forced_kernels(choice),
            patch.object(logits, "_FEW_TOKENS", 1),
            patch.object(logits, "gate_scores_backward", wraps=kernels.gate_scores_backward) as backward,
        ):
            engine = dm.initialize(TinyModel(2, router=router), config)
            losses = train(engine, range(3), rank, world_size)
            found[choice] = {"calls": backward.call_count, "losses": losses, "weights": gathered(engine)}
    return found


@pytest.mark.parametrize("router", ["top_k", "relu"])
def test_training_is_the_same(router: str) -> None:
    found = run_ranks(_train, 2, router, timeout_s=120)[0]
    in_cpp, in_torch = found["auto"], found["torch"]
    assert in_cpp["calls"] > 0 and in_torch["calls"] == 0
    assert in_cpp["losses"] == pytest.approx(in_torch["losses"], abs=1e-6)
    for name, weight in in_torch["weights"].items():
        assert torch.allclose(in_cpp["weights"][name], weight, atol=1e-5), name
