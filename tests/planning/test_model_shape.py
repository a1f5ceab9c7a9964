"""Shapes counted without weights, against the real model; experts per token from routers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import MegatronIndexedConfig, TokenShardsConfig
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.models import build_decoder, count_flops, count_parameters
from dynmoe_ds.planning import mean_k_of, shape_of
from dynmoe_ds.routing import BudgetConfig, ReluConfig, TopAnyConfig, TopKConfig, TopPConfig, router_config
from tests.helpers.megatron import NUM_WORDS, word_tokenizer
from tests.helpers.run_config import small_run

RUN_DIR = "run_dir=runs/never-made-by-a-test"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"expert__kind": "gelu", "model__num_layers": 5, "model__moe_first": 0, "model__tie_embeddings": False},
        {"router": TopKConfig(k=2, num_null_experts=1), "model__num_experts": 3},
        {"router": TopAnyConfig.budgeted(3.0), "model__moe_every": 1},
        {"model__shared_ffn_hidden_size": 20, "model__moe_every": 1},
    ],
)
def test_counts_are_those_of_the_real_model(values) -> None:
    config = small_run(**values)
    shape = shape_of(config, mean_k=None if values.get("router") == TopAnyConfig.budgeted(3.0) else 2.0)
    model = build_decoder(config, config.data.vocab_size, 0)
    experts = [layer.experts for layer in model.modules() if isinstance(layer, dm.MoELayer)]
    flops = count_flops(model, config.data.sequence_length)
    assert shape.num_moe_layers == len(experts)
    assert shape.expert_parameters(1) == sum(p.numel() for module in experts for p in module.parameters())
    assert shape.expert_parameters(2) * 2 == shape.expert_parameters(1)
    assert shape.dense_parameters + shape.expert_parameters(1) == count_parameters(model, 1).in_slots
    of_experts = {id(p) for module in experts for p in module.parameters()}
    assert sorted(shape.dense_tensors) == sorted(p.numel() for p in model.parameters() if id(p) not in of_experts)
    assert shape.dense_flops == flops.linear + flops.attention + flops.routers
    assert set(flops.per_expert.values()) == {shape.expert_flops}
    assert shape.tokens == 4 * 24


def test_a_large_model_takes_no_memory_and_the_random_state_stays() -> None:
    state = torch.get_rng_state()
    config = small_run(model__hidden_size=8192, model__num_layers=100, model__num_slots=512, model__num_heads=64,
                       model__dense_ffn_hidden_size=28672, model__expert_ffn_hidden_size=28672)  # fmt: skip
    shape = shape_of(config, 2.0)
    assert shape.expert_parameters(1) == 50 * 512 * 3 * 8192 * 28672
    assert torch.equal(torch.get_rng_state(), state)


def test_token_shards_say_their_vocabulary(tmp_path: Path) -> None:
    index = {"dtype": "uint16", "vocab_size": 777, "end_of_text": 0,
             "shards": [{"file": "a.bin", "num_tokens": 9, "sha256": "0"}]}  # fmt: skip
    (tmp_path / "index.json").write_text(json.dumps(index))
    data = TokenShardsConfig(path=str(tmp_path), sequence_length=24, held_out_windows=1)
    assert shape_of(small_run(data=data), 2.0).vocab_size == 777


def test_the_tokenizer_of_indexed_data_says_their_vocabulary(tmp_path: Path) -> None:
    data = MegatronIndexedConfig(
        paths=("unread",), tokenizer=word_tokenizer(tmp_path), sequence_length=24, held_out_fraction=0.1
    )
    assert shape_of(small_run(data=data), 2.0).vocab_size == NUM_WORDS + 1


def test_other_models_are_refused() -> None:
    config = load_config(
        [RUN_DIR, "model=vit_small", "model.pretrained=null", "data=image_folder", "data.path=images", "expert=gelu",
         "training.sample_tokens=0"]
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^model.name is vit_classifier, but only decoders"):
        shape_of(config, 2.0)


@pytest.mark.parametrize(
    ("router", "given", "wanted"),
    [
        (TopKConfig(k=3), None, (3.0, True)),
        (TopKConfig(k=9), None, (8.0, True)),
        (TopKConfig(k=3), 3.0, (3.0, True)),
        (TopKConfig(k=3, num_null_experts=2), 1.5, (1.5, False)),
        (TopAnyConfig.budgeted(2.5), None, (2.5, False)),
        (TopAnyConfig(), 2.0, (2.0, False)),
        (TopPConfig(budget=BudgetConfig(target_k=4.0)), None, (4.0, False)),
        (ReluConfig(target_k=1.5), None, (1.5, False)),
        (router_config("expert_threshold"), None, (2.0, False)),
    ],
)
def test_experts_per_token(router: Any, given: float | None, wanted: tuple[float, bool]) -> None:
    assert mean_k_of(router, 8, given) == wanted


@pytest.mark.parametrize("router", [TopAnyConfig(), TopPConfig(), TopKConfig(k=3, num_null_experts=2)])
def test_what_training_decides_must_be_given(router: Any) -> None:
    with pytest.raises(ConfigError, match=r"Give plan.mean_k, such as plan.mean_k=2\.$"):
        mean_k_of(router, 8, None)


@pytest.mark.parametrize("given", [0.0, -1.0, 8.5, float("nan")])
def test_a_mean_k_that_is_impossible(given: float) -> None:
    with pytest.raises(ConfigError, match=r"must be above 0 and at most model.num_experts \(8\)\.$"):
        mean_k_of(TopAnyConfig(), 8, given)


def test_a_mean_k_that_contradicts_the_router() -> None:
    with pytest.raises(ConfigError, match=r"^plan.mean_k is 3.0 but the router holds 2 experts per token"):
        mean_k_of(TopKConfig(k=2), 8, 3.0)
