"""Small folders as DynMoE's and MoE-LLaVA's authors publish them, with a CLIP beside them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.helpers.dynmoe_layout import MASKS, SIZES, D, E, checkpoint, phi, stablelm, write_weights

# None of a default's values, by transformers' names; `TEXT` has them by the authors'.
BUILD: dict[str, Any] = {
    "stablelm": partial(
        stablelm,
        layer_norm_eps=1e-3,
        use_qkv_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    "phi": partial(
        phi,
        layer_norm_eps=1e-3,
        hidden_act="gelu",
        rope_parameters={"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 1.0},
    ),
}
TOWER_WIDTH, IMAGE_SIZE, PATCH_SIZE = 12, 8, 4
VISION = {
    "mm_image_tower": "openai/clip-vit-large-patch14-336", "mm_video_tower": None, "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "image_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "mm_hidden_size": TOWER_WIDTH, "image_aspect_ratio": "pad",
}  # fmt: skip
MOE = {
    "moe_enable": True, "moe_mode": "sparse", "moe_layers_idx": [*MASKS], "num_experts": [E] * len(MASKS),
    "ep_size": 1, "top_k_experts": -1, "capacity_factor": 1.5, "eval_capacity_factor": 2.0, "min_capacity": 0,
    "use_residual": False, "router_aux_loss_coef": 0.01, "train_modules": ["gate_proj", "wg"],
}  # fmt: skip
COMMON = SIZES | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
TEXT: dict[str, dict[str, Any]] = {
    "stablelm": {
        "architectures": ["MoELLaVAStablelmForCausalLM"], "model_type": "moe_llava_stablelm", "hidden_act": "silu",
        "norm_eps": 1e-3, "rope_pct": 0.5, "rope_theta": 500, "use_qkv_bias": False,
    },
    "phi": {
        "architectures": ["EvalMoELLaVAPhiForCausalLM"], "model_type": "dynmoe_phi", "hidden_act": "gelu",
        "layer_norm_eps": 1e-3, "partial_rotary_factor": 1.0, "rope_theta": 700.0, "rope_scaling": None,
        "qk_layernorm": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0,
    },
}  # fmt: skip


def tower(seed: int = 5) -> CLIPVisionModel:
    """A CLIP of three layers, for images of four patches."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=8,
        initializer_factor=5.0,
    )
    return CLIPVisionModel(config).eval()


def projector_tensors() -> dict[str, Tensor]:
    """The projector's by the authors' names."""
    generator = torch.Generator().manual_seed(6)
    start = "model.mm_projector.image_spatial_proj."
    shapes = {"0.weight": (D, TOWER_WIDTH), "0.bias": (D,), "2.weight": (D, D), "2.bias": (D,)}
    return {start + name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tower_tensors(model: CLIPVisionModel) -> dict[str, Tensor]:
    """Under the names that a tower has in the authors' checkpoints, with a constant that older ones held."""
    start = "model.image_tower.image_tower.vision_model."
    found = {start + name: tensor.clone() for name, tensor in model.state_dict().items()}
    return found | {start + "embeddings.position_ids": torch.arange(5)[None]}


def published_tensors(family: str, tower_inside: CLIPVisionModel | None = None, **values: Any) -> dict[str, Tensor]:
    """The weights of a vision-language model; a Phi of the authors has no bias in its output layer."""
    tensors = checkpoint(partial(BUILD[family], **values)) | projector_tensors()
    tensors.pop("lm_head.bias", None)
    return tensors if tower_inside is None else tensors | tower_tensors(tower_inside)


def published_config(family: str, **values: Any) -> dict[str, Any]:
    return COMMON | TEXT[family] | VISION | {"moe": MOE} | values


def write_published(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], kind: str = "safetensors", shards: int = 1
) -> Path:
    folder.mkdir(exist_ok=True)
    write_weights(folder, tensors, kind, shards, indexed=shards > 1)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tower(folder: Path, model: CLIPVisionModel, with_weights: bool = True) -> Path:
    """As `openai/clip-vit-…` lies in a folder, or of it what says how the tower is built."""
    if with_weights:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
    told = {"crop_size": IMAGE_SIZE, "size": IMAGE_SIZE, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder
