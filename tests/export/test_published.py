"""Folders as DynMoE's authors publish them, against tower, projector and decoder put together by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, CLIPVisionModel, LlavaForConditionalGeneration

import dynmoe_ds as dm
from dynmoe_ds.errors import CheckpointError, ConfigError
from tests.helpers.dynmoe_layout import MASKS, Hooked, gate
from tests.helpers.published import (
    BUILD,
    IMAGE_SIZE,
    MOE,
    TOWER_WIDTH,
    VISION,
    projector_tensors,
    published_config,
    published_tensors,
    tower,
    tower_tensors,
    write_published,
    write_tower,
)
from tests.helpers.qwen_v1 import CONFIG as QWEN
from tests.helpers.qwen_v1 import reference_logits, tensors_of_qwen
from tests.helpers.reference import assert_near

IMAGE_TOKEN, PATCHES = 40, 4
BEFORE, AFTER = [7, 3, 11], [5, 38]
IDS = torch.tensor([BEFORE + [IMAGE_TOKEN] * PATCHES + AFTER])


def spliced(tensors: dict[str, Tensor], clip: CLIPVisionModel, embedding: Tensor, pixels: Tensor) -> Tensor:
    """[L, D]: the embeddings of the text with the projected patches of the image between them."""
    hidden = clip.pre_layrnorm(clip.embeddings(pixels))
    for layer in clip.encoder.layers[:-1]:  # the features of layer -2
        hidden = layer(hidden, attention_mask=None)
    projector = {name.rpartition("proj.")[2]: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    inner = F.gelu(hidden[0, 1:] @ projector["0.weight"].T + projector["0.bias"])  # without the first, CLS
    patches = inner @ projector["2.weight"].T + projector["2.bias"]
    return torch.cat([embedding[BEFORE], patches, embedding[AFTER]])


def pixels() -> Tensor:
    return torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(8))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, pixel_values=pixels()).logits[0]


def reference(family: str, tensors: dict[str, Tensor]) -> Any:
    """The dense decoder with the authors' layers, token by token, in the place of MLPs."""
    model = BUILD[family]()
    model.load_state_dict(tensors, strict=False)
    if family == "phi":
        model.lm_head.bias.data.zero_()
    for index in MASKS:
        model.model.layers[index].mlp = Hooked(tensors, index, model.model.layers[index].mlp)
    return model.eval()


@pytest.mark.parametrize(("family", "is_inside"), [("stablelm", False), ("phi", True)])
def test_a_model_sees_by_the_tower_and_the_projector(family: str, is_inside: bool, tmp_path: Path) -> None:
    clip = tower()
    tensors = published_tensors(family, clip if is_inside else None)
    folder = write_published(tmp_path / "published", tensors, published_config(family))
    seen_by = write_tower(tmp_path / "clip", clip, with_weights=not is_inside)
    model: Any = dm.import_published_model(folder, seen_by)
    assert type(model) is LlavaForConditionalGeneration and not model.training
    assert model.config.image_token_id == IMAGE_TOKEN and model.config.text_config.vocab_size == IMAGE_TOKEN + 1
    want = reference(family, tensors)
    with torch.no_grad():
        embeddings = spliced(tensors, clip, want.model.embed_tokens.weight, pixels())
        expected = want(inputs_embeds=embeddings[None]).logits[0]
        blind = want(input_ids=IDS.clamp(max=39)).logits[0]
    got = logits(model)
    assert_near(got[:, :IMAGE_TOKEN], expected)
    # The token that stands for images can never be the first choice.
    assert_near(got[:, IMAGE_TOKEN], expected.mean(1))
    assert not torch.allclose(expected[-1], blind[-1], atol=0.1), "the image matters"

    dm.save_model(model, tmp_path / "saved")
    assert torch.equal(logits(dm.load_model(tmp_path / "saved")), got)
    dm.export_hugging_face(model, tmp_path / "exported")
    dm.register_auto_classes()
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits(exported), got)


def test_a_first_qwen_sees_too(tmp_path: Path) -> None:
    clip = tower()
    own = tensors_of_qwen(MASKS)
    vision = projector_tensors() | tower_tensors(clip)
    stored = own | {name.replace("model.", "transformer.", 1): tensor for name, tensor in vision.items()}
    folder = write_published(tmp_path / "published", stored, QWEN | VISION | {"moe": MOE})
    model: Any = dm.import_published_model(folder, write_tower(tmp_path / "clip", clip, with_weights=False))
    with torch.no_grad():
        embeddings = spliced(vision, clip, own["transformer.wte.weight"], pixels())
        want = reference_logits(own, embeddings.double())
    assert_near(logits(model)[:, :IMAGE_TOKEN].double(), want, torch.float32)


def test_the_language_model_alone_is_as_import_into_a_dense_one(tmp_path: Path) -> None:
    tensors = published_tensors("stablelm", tower())
    folder = write_published(tmp_path / "published", tensors, published_config("stablelm"))
    got = dm.import_published_model(folder, text_only=True).state_dict()
    ignored = ["model.mm_projector.", "model.image_tower."]
    want = dm.import_dynmoe_checkpoint(BUILD["stablelm"](), tensors, ignored=ignored).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_checkpoint_without_experts_gives_the_dense_model(tmp_path: Path) -> None:
    """Of the stages before; its gates and masks are not there, and `moe` is neither."""
    tensors = dict(BUILD["phi"]().state_dict())
    values = published_config("phi", moe=None, mm_image_tower=None, model_type="llava_phi", architectures=None)
    got: Any = dm.import_published_model(write_published(tmp_path / "a", tensors, values))
    assert all(torch.equal(got.state_dict()[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 2), ("bin", 2), ("bin", 1)])
def test_files_of_16_bits_give_a_model_of_16_bits(kind: str, shards: int, tmp_path: Path) -> None:
    """Masks that the authors' code multiplied by float32 records are float32 beside them."""
    clip = tower()
    tensors = {name: tensor.bfloat16() for name, tensor in published_tensors("stablelm", clip).items()}
    tensors[gate(0) + "experts_mask"] = tensors[gate(0) + "experts_mask"].float()
    folder = write_published(tmp_path / "published", tensors, published_config("stablelm"), kind, shards)
    model: Any = dm.import_published_model(folder, write_tower(tmp_path / "clip", clip))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    layers = model.model.language_model.layers
    assert [layers[index].mlp.placement.live_ids for index in MASKS] == [(0, 2, 3), (1, 3)]
    stored = tensors["model.image_tower.image_tower.vision_model.encoder.layers.2.mlp.fc1.weight"]
    assert torch.equal(model.model.vision_tower.encoder.layers[2].mlp.fc1.weight, stored)
    assert logits(model.float()).isfinite().all()


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({}, {}, "sees by openai/clip-vit-large-patch14-336, which is not given. Download that model and give its"),
        ({}, {"vision_tower": "clip", "text_only": True}, "'clip' but text_only leaves it out. Give one of the two."),
        ({"mm_image_tower": None}, {"vision_tower": "clip"}, "names no mm_image_tower. Give one of the two."),
        ({}, {"vision_tower": "gone"}, "vision_tower is 'gone', which is not a folder here"),
        ({"image_projector_type": "linear"}, {"vision_tower": "clip"}, "is 'linear', but only 'mlp2x_gelu' can be"),
        ({"mm_vision_select_feature": "cls_patch"}, {"vision_tower": "clip"}, "is 'cls_patch', but only 'patch' can"),
        ({"mm_use_im_start_end": True}, {"vision_tower": "clip"}, "mm_use_im_start_end is True, but only False can"),
        ({"mm_video_tower": "video"}, {"vision_tower": "clip"}, "mm_video_tower is 'video', but only None can"),
        ({"mm_vision_select_layer": None}, {"vision_tower": "clip"}, "it has no mm_vision_select_layer, a number."),
        ({"hidden_size": None}, {"text_only": True}, "config.json: it has no hidden_size."),
        ({"rope_scaling": {"type": "linear"}}, {"text_only": True}, "but only unscaled rotary embeddings are read."),
        (
            {"model_type": "moe_llava_qwen1_5", "architectures": ["MoELLaVAQwen1_5ForCausalLM"]},
            {"text_only": True},
            "has model_type 'moe_llava_qwen1_5' and architectures ['MoELLaVAQwen1_5ForCausalLM']. Known are moe_llava_",
        ),
    ],
)
def test_what_cannot_be_imported_is_refused(
    values: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_published(
        tmp_path / "published", published_tensors("stablelm"), published_config("stablelm", **values)
    )
    if options.get("vision_tower") == "clip":
        write_tower(tmp_path / "clip", tower())
        options = options | {"vision_tower": f"{tmp_path}/clip"}
    with pytest.raises(ConfigError) as raised:
        dm.import_published_model(folder, **options)
    assert message in str(raised.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"moe_layers_idx": [0, 1]}, "in moe, moe_layers_idx is [0, 1], but the weights have gates in [0, 2]."),
        ({"num_experts": [4, 8]}, "in moe, num_experts is [4, 8], but the weights have [4, 4]."),
        ({"top_k_experts": 2}, "top_k_experts is 2: its gates take a fixed number of experts, which is not DynMoE's"),
        ({"use_residual": True}, "use_residual is true: layers with a dense MLP beside their experts cannot"),
    ],
)
def test_layers_other_than_the_configuration_says(moe: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = published_config("stablelm", moe=MOE | moe)
    folder = write_published(tmp_path / "published", published_tensors("stablelm"), config)
    with pytest.raises(CheckpointError) as raised:
        dm.import_published_model(folder, text_only=True)
    assert message in str(raised.value)


def test_towers_and_projectors_that_do_not_fit(tmp_path: Path) -> None:
    clip = tower()
    tensors = published_tensors("stablelm", clip)
    folder = write_published(tmp_path / "published", tensors, published_config("stablelm"))
    seen_by = write_tower(tmp_path / "clip", clip)
    told = json.loads((seen_by / "config.json").read_text())
    (seen_by / "config.json").write_text(json.dumps(told | {"hidden_size": 24}))
    with pytest.raises(ConfigError, match=rf"are 24 wide, but the projector in .* takes {TOWER_WIDTH}\. Give"):
        dm.import_published_model(folder, seen_by)
    (seen_by / "config.json").write_text(json.dumps(told | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"does not fit CLIPVisionModel\. It lacks encoder.layers.3"):
        dm.import_published_model(folder, seen_by)
    (seen_by / "config.json").write_text(json.dumps(told | {"model_type": "vit"}))
    with pytest.raises(ConfigError, match="holds a model of type vit where clip_vision_model or clip is needed"):
        dm.import_published_model(folder, seen_by)
    write_tower(seen_by, clip)
    first = "model.mm_projector.image_spatial_proj.0.weight"
    write_published(folder, {name: t for name, t in tensors.items() if name != first}, published_config("stablelm"))
    with pytest.raises(CheckpointError, match=f"has no {first}, without which the tower's features are nothing"):
        dm.import_published_model(folder, seen_by)
    (folder / "config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"config.json is missing or damaged .JSONDecodeError"):
        dm.import_published_model(folder, seen_by)
