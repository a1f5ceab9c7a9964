"""A module that all tokens pass beside the experts (`MoELayer(shared=...)`) is trained, saved and counted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import dynmoe_ds as dm
from dynmoe_ds.errors import CheckpointError
from dynmoe_ds.models import count_flops
from tests.export.test_model import decoder
from tests.helpers.models import FFN, HIDDEN, TinyModel, batch, deepspeed_config, train
from tests.helpers.spawn import run_ranks


def make(ep_size: int) -> TinyModel:
    model = TinyModel(ep_size, num_experts=4)
    for layer in model.moe:
        layer.shared = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))
    return model


def _train_and_load(rank: int, world_size: int, ep_size: int, folder: str, stages: tuple[int, ...]) -> dict[int, Any]:
    results: dict[int, Any] = {}
    for stage in stages:
        adaptation, dispatch = dm.AdaptationConfig(2, 2), dm.DispatchConfig(chunks=2)
        engine = dm.initialize(make(ep_size), deepspeed_config(stage), adaptation, dispatch=dispatch)
        losses = train(engine, range(3), rank, world_size)
        engine.save_checkpoint(f"{folder}/{world_size}-{stage}")
        losses += train(engine, range(3, 6), rank, world_size)
        live = [placement.live_ids for placement in engine.placements().values()]

        again = dm.initialize(make(ep_size), deepspeed_config(stage), adaptation, dispatch=dispatch)
        again.load_checkpoint(f"{folder}/{world_size}-{stage}")
        results[stage] = losses, live, losses[3:] == train(again, range(3, 6), rank, world_size)
    return results


def test_it_trains_on_two_ranks_as_on_one_and_is_in_checkpoints(tmp_path: Path) -> None:
    stages = (0, 2, 3)
    one = run_ranks(_train_and_load, 1, 1, f"{tmp_path}", stages)[0]
    two = run_ranks(_train_and_load, 2, 2, f"{tmp_path}", stages)[0]
    for stage in stages:
        losses, live, goes_on = one[stage]
        assert two[stage][0] == pytest.approx(losses, abs=5e-6), stage
        assert two[stage][1] == live and len(live[0]) > 4, stage
        assert goes_on and two[stage][2], "the checkpoint lacks the module"


def test_a_decoders_shared_expert_is_in_a_saved_model_and_loads(tmp_path: Path) -> None:
    model = decoder(model__shared_ffn_hidden_size=12)
    dm.save_model(model, tmp_path / "model")
    loaded = dm.load_model(tmp_path / "model")
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        for layer in loaded.model.layers:
            layer.mlp.shared = None
        assert not torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def _resize(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    losses = []
    for resizes in (True, False):
        engine = dm.initialize(make(world_size), deepspeed_config(2), dm.AdaptationConfig(2, 2))
        found = train(engine, range(3), rank, world_size)
        if resizes:
            engine.resize_slots(12)
        losses.append(found + train(engine, range(3, 6), rank, world_size))
    return losses[0], losses[1]


def test_a_pool_of_another_size_leaves_it_as_it_is() -> None:
    resized, same = run_ranks(_resize, 2)[0]
    assert resized == pytest.approx(same, abs=5e-6)


def test_activation_checkpointing_changes_nothing() -> None:
    def gradients(model: TinyModel) -> dict[str, torch.Tensor]:
        x, y = batch(0, 24)
        with dm.StepLedger():
            model(x.requires_grad_(), y).backward()
        return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}

    model, again = make(1), make(1)
    again.checkpoint = partial(checkpoint, use_reentrant=False)
    want, got = gradients(model), gradients(again)
    assert "moe.1.shared.0.weight" in want and want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


@pytest.mark.parametrize("kind", ["linear", "an MLP with another activation"])
def test_a_saved_model_holds_it_and_load_model_says_that_it_cannot_build_it(tmp_path: Path, kind: str) -> None:
    model = decoder()
    name, layer = next((name, m) for name, m in model.named_modules() if isinstance(m, dm.MoELayer))
    layer.shared = nn.Linear(layer.hidden_size, layer.hidden_size)
    if kind != "linear":
        layer.shared = LlamaMLP(LlamaConfig.from_dict(model.config.to_dict() | {"hidden_act": "gelu"}))
    dm.save_model(model, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        for key, value in layer.shared.named_parameters():
            assert torch.equal(file.get_tensor(f"{name}.shared.{key}"), value)
        assert not any(key.endswith(("active", "expert_ids")) for key in file.keys())  # noqa: SIM118
    with pytest.raises(CheckpointError, match=f"{name} has a module that all tokens pass"):
        dm.load_model(tmp_path / "model")


def test_its_flops_are_those_of_every_token() -> None:
    with_shared, without = count_flops(make(1), 8), count_flops(TinyModel(1, num_experts=4), 8)
    mean_k = {"moe.0": 1.0, "moe.1": 1.0}
    assert with_shared.forward(mean_k) - without.forward(mean_k) == 2 * 2 * (2 * HIDDEN * FFN)
