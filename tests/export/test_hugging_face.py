"""Export to Hugging Face's format, and back by `from_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BertConfig, BertModel

import dynmoe_ds as dm
from dynmoe_ds.checkpoint.entries import entries
from dynmoe_ds.errors import CheckpointError, ConfigError
from dynmoe_ds.export import moe_class
from dynmoe_ds.export.hugging_face import KINDS
from dynmoe_ds.models import build_decoder, dense_model
from dynmoe_ds.moe import MoELayer, Placement, moe_layers
from tests.helpers.run_config import small_run

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24}
VISION |= {"num_hidden_layers": 2, "num_attention_heads": 2}
LLAVA_ON_PHI = "LlavaForConditionalGeneration on Phi"  # whose output layer has a bias
LLAVA_ON_QWEN = "LlavaForConditionalGeneration on Qwen2 with SigLIP"
UPCYCLED = [*(name for name in KINDS if "Mixtral" not in name and "Moe" not in name), LLAVA_ON_PHI, LLAVA_ON_QWEN]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    dm.register_auto_classes()
    dm.register_auto_classes()  # twice is as good as once
    yield


def upcycled(name: str) -> Any:
    """A small model of a class, with experts that differ, at other ids than their slots, beside free slots."""
    torch.manual_seed(0)
    kind = getattr(transformers, name.partition(" ")[0])
    if name.startswith("Llava"):
        decoder = next((decoder for decoder in ("Phi", "Qwen2") if decoder in name), "Llama")
        tower: dict[str, Any] = {"vision_config": VISION}
        if "SigLIP" in name:  # which has no token of its own before the patches
            tower = {"vision_config": VISION | {"model_type": "siglip_vision_model"}}
            tower["vision_feature_select_strategy"] = "full"
        text = getattr(transformers, f"{decoder}Config")(**SIZES)
        config = kind.config_class(text_config=text, image_token_id=39, vision_feature_layer=-2, **tower)
        model = dense_model(kind, config, seed=0)
        dm.upcycle(model.model.language_model, num_experts=3, num_slots=6, noise=0.3, seed=1)
    else:
        model = dm.upcycle(kind(kind.config_class(**SIZES)), num_experts=3, num_slots=6, noise=0.3, seed=1)
    return model.eval()


def inputs(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(3, 15)[None]
    if "Llava" not in type(model).__name__:
        return {"input_ids": ids}
    ids = torch.cat([torch.full((1, 4), 39), ids], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(model)).logits
    return found


def auto(name: str) -> Any:
    return AutoModelForImageTextToText if name.startswith("Llava") else AutoModelForCausalLM


def weights(model: Any) -> dict[str, Tensor]:
    """Every weight once, those of experts by their ids."""
    found: dict[str, Tensor] = {}
    for entry in entries(model):
        if entry.slots is None:
            found[entry.key] = entry.tensor
        else:
            found |= {name: entry.tensor[slot] for name, slot in entry.slots.items()}
    return found


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    unlike = [key for key in want if found[key].dtype != want[key].dtype or not torch.equal(found[key], want[key])]
    assert unlike == []


def assert_all_comes_back(exported: Any, model: Any, folder: Path) -> None:
    """From Hugging Face's format, and from there back into a model of this project."""
    assert_same(weights(exported), weights(model))
    dm.save_model(exported, folder / "own")
    back = dm.load_model(folder / "own", num_slots=5)
    assert type(back) is type(model) and back.config.model_type == model.config.model_type
    assert not hasattr(back.config, "moe_layers")
    assert_same(weights(back), weights(model))
    assert {layer.num_slots for layer in moe_layers(back).values()} == {5}
    assert torch.equal(logits(dm.load_model(folder / "own")), logits(exported))


@pytest.mark.parametrize("name", UPCYCLED)
def test_what_is_read_back_computes_the_same(name: str, tmp_path: Path) -> None:
    model = upcycled(name)
    dm.export_hugging_face(model, tmp_path / "model")
    back = auto(name).from_pretrained(tmp_path / "model")
    assert (
        type(back).__name__ == f"DynMoE{name.partition(' ')[0]}" and isinstance(back, type(model)) and not back.training
    )
    torch.testing.assert_close(logits(back), logits(model))
    assert back.config.model_type == f"dynmoe_{model.config.model_type}"
    written = [m.generate(**inputs(m), max_new_tokens=6, do_sample=False) for m in (back, model)]
    assert torch.equal(*written)
    (layer,) = (module for module in back.modules() if isinstance(module, MoELayer))
    assert layer.num_slots == 3, "no free slots"
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        (key,) = (key for key in file.keys() if key.endswith("experts.w1"))  # noqa: SIM118 - a file, no dictionary
        assert file.get_slice(key).get_shape()[0] == 3
    assert_all_comes_back(back, model, tmp_path)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", LLAVA_ON_QWEN])
def test_weights_of_16_bits_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    model = upcycled(name).bfloat16()
    dm.export_hugging_face(model, tmp_path / "model")
    assert_all_comes_back(auto(name).from_pretrained(tmp_path / "model"), model, tmp_path)


def test_a_second_round_changes_nothing_at_all(tmp_path: Path) -> None:
    dm.export_hugging_face(upcycled("LlamaForCausalLM"), tmp_path / "first")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    first.save_pretrained(tmp_path / "second")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert torch.equal(logits(first), logits(second))


def test_experts_keep_their_ids_and_16_bits_stay(tmp_path: Path) -> None:
    """Of a pool in which experts came, went and moved: their ids are in another order than their slots."""
    model = build_decoder(small_run(model__moe_every=1), 40, eos_token_id=0).bfloat16().eval()
    layer = model.model.layers[1].mlp
    ids = tuple(None if e is None else (7, 2, 5, 0)[e] for e in layer.placement.expert_ids)
    layer.placement = Placement(expert_ids=ids, next_id=9, ep_size=1)
    dm.export_hugging_face(model, tmp_path / "model")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert back.dtype == torch.bfloat16 and back.model.layers[1].mlp.experts.w1.dtype == torch.bfloat16
    assert back.model.layers[1].mlp.placement.live_ids == (0, 2, 5, 7)
    assert back.model.layers[1].mlp.placement.next_id == 9
    assert torch.equal(logits(back), logits(dm_round(model, tmp_path)))


def dm_round(model: Any, folder: Path) -> Any:
    dm.save_model(model, folder / "own")
    return dm.load_model(folder / "own")


OF_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("Qwen2Moe", {**OF_QWEN, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 2}),
        ("Qwen3Moe", {**OF_QWEN, "head_dim": 8}),
    ],
)
def test_imported_mixtures_of_experts(kind: str, experts: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **experts)
    original = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    want = logits(original)
    model = dm.import_top_k_model(original, num_slots=6)
    torch.testing.assert_close(logits(model), want)
    dm.export_hugging_face(model, tmp_path / "model")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), want)
    torch.testing.assert_close(logits(dm_round(model, tmp_path)), want)


def test_a_shared_expert_comes_along(tmp_path: Path) -> None:
    shared = build_decoder(small_run(model__shared_ffn_hidden_size=24), 40, eos_token_id=0).eval()
    dm.export_hugging_face(shared, tmp_path / "shared")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shared")), logits(shared))


def test_the_configuration_says_what_the_layers_are(tmp_path: Path) -> None:
    model = upcycled("Qwen2ForCausalLM")
    dm.export_hugging_face(model, tmp_path / "model")
    told = json.loads((tmp_path / "model" / "config.json").read_text())
    assert told["architectures"] == ["DynMoEQwen2ForCausalLM"] and told["model_type"] == "dynmoe_qwen2"
    assert told["moe_layers"]["model.layers.0.mlp"]["expert_ids"] == [0, 1, 2]
    assert AutoConfig.from_pretrained(tmp_path / "model").moe_layers == told["moe_layers"]
    assert moe_class(transformers.Qwen2ForCausalLM) is moe_class(transformers.Qwen2ForCausalLM)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The model is a BertModel. Export one of LlamaForCausalLM, "):
        dm.export_hugging_face(
            BertModel(BertConfig(**{k: v for k, v in SIZES.items() if "key" not in k})), tmp_path / "a"
        )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        dm.export_hugging_face(upcycled("LlamaForCausalLM"), tmp_path / "b")
    odd = upcycled("LlamaForCausalLM")
    odd.model.layers[0].mlp.shared = torch.nn.Linear(16, 16)
    with pytest.raises(ConfigError, match="has a shared module that is no MLP as Llama's"):
        dm.export_hugging_face(odd, tmp_path / "c")
    spread = upcycled("LlamaForCausalLM")
    spread.model.layers[0].mlp.ep_size = 2
    with pytest.raises(ConfigError, match=r"model.layers.0.mlp is spread over ranks"):
        dm.export_hugging_face(spread, tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["b"], "nothing is left"
