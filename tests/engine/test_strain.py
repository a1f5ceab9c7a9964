"""Strain that the engine records, against the gradients of a model without an engine."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.engine.activation_checkpointing import non_reentrant_checkpoint
from tests.helpers.models import TinyModel, batch, deepspeed_config, shard
from tests.helpers.spawn import run_ranks

ROUTER = "top_any_recommended"
CHECKPOINTS: dict[str, Any] = {
    "none": None,
    "torch": partial(checkpoint, use_reentrant=False),
    "deepspeed": non_reentrant_checkpoint,
}
RANKS, MICRO_STEPS = 2, 2


def _run(rank: int, world_size: int) -> dict[Any, Any]:
    out = {}
    for stage, name in product((0, 1, 2, 3), CHECKPOINTS):
        model = TinyModel(2, num_experts=3, router=ROUTER, checkpoint=CHECKPOINTS[name])
        adaptation = dm.AdaptationConfig(9, 9, rule="split_strained")
        engine = dm.initialize(model, deepspeed_config(stage, accumulate=MICRO_STEPS), adaptation)
        for micro in range(MICRO_STEPS):
            engine.backward(engine(*shard(batch(micro, 32), rank, world_size)))
            engine.step()
        out[stage, name] = {key: record.statistics["strain"] for key, record in engine.take_records().items()}
    return out


@pytest.fixture(scope="module")
def strains() -> dict[Any, Any]:
    return run_ranks(_run, RANKS, timeout_s=120)[0]


def _by_hand() -> dict[str, Tensor]:
    """Sum over ranks and micro steps of weight x length of the gradient of a layer's output, token by token."""
    model = TinyModel(1, num_experts=3, router=ROUTER)
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for layer in model.moe:
        layer.register_forward_hook(lambda _, args, y: outputs.append(y))
        layer.router.register_forward_hook(lambda _, args, routing: weights.append(routing.weights.detach()))
    sums = {f"moe.{i}": torch.zeros(8, dtype=torch.float64) for i in range(2)}
    for micro, rank in product(range(MICRO_STEPS), range(RANKS)):
        outputs.clear(), weights.clear()
        with dm.StepLedger() as ledger:
            loss = model(*shard(batch(micro, 32), rank, RANKS))
        gradients = torch.autograd.grad((loss + ledger.aux_loss()) / MICRO_STEPS, outputs)
        for name, gradient, weight in zip(sums, gradients, weights, strict=True):
            for token in range(len(gradient)):
                sums[name] += weight[token].double() * gradient[token].double().norm()
    return sums


def _several_passes(rank: int, world_size: int) -> dict[str, Any]:
    """Two forward passes and one backward pass, against a backward pass after each."""
    out = {}
    for name in ("together", "apart"):
        adaptation = dm.AdaptationConfig(9, 9, rule="split_strained")
        engine = dm.initialize(TinyModel(1, num_experts=3, router=ROUTER), deepspeed_config(1), adaptation)
        batches = batch(0, 32), batch(1, 32)
        if name == "together":
            engine.backward(sum(engine(*b) for b in batches))
        else:
            for b in batches:
                engine.backward(engine(*b))
        engine.step()
        out[name] = engine.take_records()["moe.0"]
    return out


def test_passes_before_one_backward_pass_add_up() -> None:
    records = run_ranks(_several_passes, 1)[0]
    together, apart = records["together"], records["apart"]
    assert int(together.num_tokens) == int(apart.num_tokens) == 64
    torch.testing.assert_close(together.statistics["strain"], apart.statistics["strain"], rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Tensor]:
    return _by_hand()


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_strain_is_that_of_the_plain_model(strains: Any, by_hand: dict[str, Tensor], stage: int, name: str) -> None:
    for layer, expected in by_hand.items():
        assert expected.count_nonzero() == 3
        torch.testing.assert_close(strains[stage, name][layer], expected, rtol=1e-5, atol=1e-9)
