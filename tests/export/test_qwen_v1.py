"""The first Qwen as Qwen2, against its own formulas in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

import dynmoe_ds as dm
from dynmoe_ds.errors import CheckpointError, ConfigError
from tests.helpers.dynmoe_layout import MASKS, write_weights
from tests.helpers.qwen_v1 import CONFIG, VOCAB, D, reference_logits, tensors_of_qwen
from tests.helpers.reference import assert_near


def write_qwen(folder: Path, tensors: dict[str, Tensor], **values: Any) -> Path:
    write_weights(folder, tensors, "safetensors", 1, indexed=False)
    (folder / "config.json").write_text(json.dumps(CONFIG | values))
    return folder


@pytest.mark.parametrize("experts", [{}, MASKS], ids=["dense", "dynmoe"])
def test_the_model_computes_what_the_first_qwen_does(experts: dict[int, list[float]], tmp_path: Path) -> None:
    tensors = tensors_of_qwen(experts)
    constants = {
        "transformer.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.0.attn.masked_bias": torch.ones(()),
    }
    model: Any = dm.import_published_model(write_qwen(tmp_path, tensors | constants))
    assert type(model) is Qwen2ForCausalLM and not model.training
    assert model.config.max_position_embeddings == 12, "where log-n attention and dynamic NTK begin"
    is_moe = {index for index, layer in enumerate(model.model.layers) if isinstance(layer.mlp, dm.MoELayer)}
    assert is_moe == experts.keys()
    ids = torch.randint(0, VOCAB, (12,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model.double()(input_ids=ids[None]).logits[0]
        want = reference_logits(tensors, tensors["transformer.wte.weight"].double()[ids])
    assert_near(got, want, torch.float32)
    if not experts:  # then transformers' own class reads it, as model.text_pretrained does
        model.save_pretrained(tmp_path / "qwen2")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2")
        assert torch.equal(again(input_ids=ids[None]).logits[0], got)


@pytest.mark.parametrize("tied", [False, True])
def test_without_stretching_it_goes_as_far_as_the_positions(tied: bool, tmp_path: Path) -> None:
    tensors = tensors_of_qwen({})
    if tied:
        del tensors["lm_head.weight"]
    write_qwen(tmp_path, tensors, use_dynamic_ntk=False, use_logn_attn=False, tie_word_embeddings=tied)
    model: Any = dm.import_published_model(tmp_path)
    assert model.config.max_position_embeddings == 32
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotary_pct": 0.25}, "rotary_pct is 0.25, but Qwen2 computes what it does with 1.0."),
        ({"no_bias": False}, "no_bias is False, but Qwen2 computes what it does with True."),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, but"),
        ({"emb_dropout_prob": 0.1}, "It counts in training alone: set it to 0.0 to go on without."),
        ({"use_cache_quantization": True}, "use_cache_quantization is True, but"),
        ({"kv_channels": 4}, "kv_channels is 4 for 2 heads, but together they must be as wide as hidden_size (16)."),
        ({"seq_length": None}, "config.json: it has no seq_length."),
    ],
)
def test_what_qwen2_cannot_compute_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        dm.import_published_model(write_qwen(tmp_path, tensors_of_qwen({}), **values))
    assert message in str(raised.value)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = tensors_of_qwen({})
    tensors["transformer.h.0.attn.c_attn.weight"] = torch.ones(3 * D + 1, D)
    tensors["transformer.h.1.mlp.c_proj.bias"] = torch.ones(D)
    del tensors["transformer.h.1.ln_2.weight"]
    with pytest.raises(CheckpointError) as raised:
        dm.import_published_model(write_qwen(tmp_path, tensors))
    for message in (
        "It lacks model.layers.1.post_attention_layernorm.weight",
        "no place for model.layers.1.mlp.down_proj.bias",
        "model.layers.0.self_attn.q_proj.weight [49, 16] where the model has [16, 16]",
    ):
        assert message in str(raised.value)
