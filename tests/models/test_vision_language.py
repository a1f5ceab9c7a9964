"""Llava from configurations: what it computes, what of it trains, and what of pretrained folders it takes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.helpers.run_config import changed
from tests.helpers.vision_language import empty_files, tiny_run
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import dynmoe_ds as dm
from dynmoe_ds.config.schema import RunConfig, StageConfig
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.models import (
    Vocabulary,
    build_vision_language,
    finish_vision_language,
    llava_backbone,
    parameter_groups,
    tokens_per_image,
)

VOCABULARY = Vocabulary(size=60, image_token_id=3, pad_token_id=0, end_token_id=2)
IMAGE = VOCABULARY.image_token_id
TOWER = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    router = ("router=top_k", "router.k=4", "router.renormalize=true")
    return tiny_run(empty_files(tmp_path_factory.mktemp("digits")), Path("never"), "experts", *router)


def stage(*trained: Any, has_experts: bool = False) -> StageConfig:
    return StageConfig(trained=trained, has_experts=has_experts)


def build(config: RunConfig, vocabulary: Vocabulary = VOCABULARY) -> LlavaForConditionalGeneration:
    assert not isinstance(config.model, type)
    backbone = llava_backbone(config.model, vocabulary, image_size=32, max_length=64)  # type: ignore[arg-type]
    return finish_vision_language(build_vision_language(config, backbone), config)


def with_images(seed: int = 0) -> dict[str, Tensor]:
    """Two rows of text and 16 tokens of an image each; the second is padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 60, (2, 24), generator=generator)
    ids[:, 2:18] = IMAGE
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 20:] = False
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


def of_text() -> dict[str, Tensor]:
    batch = with_images()
    batch["input_ids"][batch["input_ids"] == IMAGE] = 5
    return batch | {"pixel_values": torch.zeros(1, 3, 32, 32)}


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch).logits
    return found


def test_with_all_experts_chosen_it_computes_what_the_dense_model_does(run):
    dense = build(changed(run, stage=stage("projector")))
    experts = build(run)
    layers = [name for name, module in experts.named_modules() if isinstance(module, dm.MoELayer)]
    assert layers == ["model.language_model.layers.0.mlp", "model.language_model.layers.2.mlp"], "every other layer"
    torch.testing.assert_close(logits(experts, with_images()), logits(dense, with_images()))
    assert not torch.allclose(logits(dense, with_images()), logits(dense, with_images(seed=1)))


def test_text_alone_passes_tower_and_projector_and_comes_out_as_without_them(run):
    """So that every rank has gradients of the same parameters, zero where there was no image."""
    model = build(changed(run, stage=stage("vision_tower", "projector", "language_model")))
    batch = of_text()
    alone = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
    assert torch.equal(logits(model, batch), logits(model, alone))
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert model.model.language_model.embed_tokens.weight.grad.any()
    model.zero_grad()
    model(**with_images(), labels=with_images()["input_ids"]).loss.backward()
    assert all(parameter.grad.any() for parameter in model.model.multi_modal_projector.parameters())


PARTS = {
    "vision_tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "language_model": ("model.language_model.", "lm_head."),
    "experts": tuple(f"model.language_model.layers.{i}.mlp.{part}." for i in (0, 2) for part in ("router", "experts")),
}


@pytest.mark.parametrize("trained", [("projector",), ("projector", "language_model"), ("experts",), ("vision_tower",)])
def test_a_stage_trains_what_it_names_and_nothing_else(trained, run):
    """The public code of MoE-LLaVA finds the third stage's parameters by a part of their names, dense FFNs too."""
    model = build(changed(run, stage=stage(*trained, has_experts=True)))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == any(name.startswith(PARTS[part]) for part in trained), name
    held = {id(param) for group in parameter_groups(model, 0.0) for param in group["params"]}
    assert held == {id(param) for param in model.parameters() if param.requires_grad}, "what an optimiser gets"
    assert held


def test_weights_are_the_seeds_and_leave_random_numbers_alone(run):
    before = torch.random.get_rng_state()
    first, second, other = build(run), build(run), build(changed(run, seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_another_kind_of_expert_and_experts_too_early_are_refused(run):
    with pytest.raises(ConfigError, match=r"expert.kind is gelu but the language model's FFNs are swiglu"):
        build(changed(run, expert__kind="gelu"))
    early = changed(run, stage=dataclasses.replace(stage("projector"), start="runs/x/model"))
    with pytest.raises(ConfigError, match=r"has_experts is false but the model in stage.start \(runs/x/model\) has"):
        finish_vision_language(build(run), early)


TOWERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER, intermediate_size=48)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER, intermediate_size=48)),
}
# Kinds of experts that their FFNs become.
DECODERS = {"llama": "swiglu", "stablelm": "swiglu", "qwen2": "swiglu", "mistral": "swiglu", "phi": "gelu_tanh"}


def decoder(model_type: str) -> Any:
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(model_type, **DECODER)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of pretrained models by name."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(3)
    models = {name: make() for name, make in TOWERS.items()} | {name: decoder(name) for name in DECODERS}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def pretrained(run: RunConfig, folders: dict[str, Path], tower: str, text: str) -> RunConfig:
    return changed(
        run,
        model__vision_pretrained=f"{folders[tower]}",
        model__vision_sizes=None,
        model__text_pretrained=f"{folders[text]}",
        model__text_sizes=None,
        expert__kind=DECODERS.get(text, "swiglu"),
    )


@pytest.mark.parametrize("text", DECODERS)
def test_a_pretrained_decoder_is_taken_whole(text, run, folders):
    """On text the model says what the decoder says, with every expert a copy of its FFN."""
    model = build(pretrained(run, folders, "clip", text))
    batch = of_text()
    alone = {name: batch[name] for name in ("input_ids", "attention_mask")}
    want = logits(AutoModelForCausalLM.from_pretrained(folders[text]), alone)
    torch.testing.assert_close(logits(model, batch)[batch["attention_mask"]], want[batch["attention_mask"]])


@pytest.mark.parametrize("tower", TOWERS)
def test_a_pretrained_tower_is_taken_whole(tower, run, folders):
    """Its features before the last layer, without CLIP's own token, are what the projector gets."""
    model = build(pretrained(run, folders, tower, "llama"))
    assert tokens_per_image(model.config) == 16
    batch, seen = with_images(), []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, batch)
    kind = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[tower]
    with torch.no_grad():
        hidden = kind.from_pretrained(folders[tower])(batch["pixel_values"], output_hidden_states=True).hidden_states[
            -2
        ]
    torch.testing.assert_close(seen[0], hidden[:, 1:] if tower == "clip" else hidden)


def test_a_decoder_gets_rows_for_tokens_that_it_has_not(run, folders):
    longer = dataclasses.replace(VOCABULARY, size=61, image_token_id=60)
    before = torch.random.get_rng_state()
    model = build(pretrained(run, folders, "clip", "qwen2"), longer)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == 61
    assert torch.equal(torch.random.get_rng_state(), before)
    known = AutoModelForCausalLM.from_pretrained(folders["qwen2"]).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[:60], known)


def test_frequencies_stay_exact_in_16_bits(run, folders):
    model = build(pretrained(run, folders, "clip", "stablelm"))
    exact = model.model.language_model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert torch.equal(model.model.language_model.rotary_emb.inv_freq, exact)
    assert exact.dtype == torch.float32 and model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__vision_pretrained": "nowhere"}, "model.vision_pretrained is 'nowhere', which is not a folder here"),
        (
            {"model__vision_pretrained": "llama"},
            "holds a model of type llama where clip_vision_model or",
        ),
        (
            {"model__text_pretrained": "clip"},
            "holds a model of type clip_vision_model where a decoder that",
        ),
    ],
)
def test_folders_that_do_not_fit(values, message, run, folders):
    config = pretrained(run, folders, "clip", "llama")
    config = changed(config, **{key: f"{folders.get(name, name)}" for key, name in values.items()})
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_inputs_that_do_not_fit(run, folders, tmp_path):
    config = pretrained(run, folders, "clip", "llama")
    with pytest.raises(ConfigError, match=r"data.image_size is 48 but the tower in .* is for images of 32"):
        llava_backbone(config.model, VOCABULARY, image_size=48, max_length=64)
    with pytest.raises(ConfigError, match=r"data.sequence_length is 65 but the model in .* takes at most 64 tokens"):
        llava_backbone(config.model, VOCABULARY, image_size=32, max_length=65)
    broken = shutil.copytree(folders["clip"], tmp_path / "clip")
    (broken / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"model.vision_pretrained is .*, whose weights cannot be loaded"):
        build(changed(config, model__vision_pretrained=f"{broken}"))
