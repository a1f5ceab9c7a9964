"""Trained models in Hugging Face's format: with this package installed `from_pretrained` reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from dynmoe_ds.checkpoint.publish import check_vacant, published
from dynmoe_ds.errors import CheckpointError, ConfigError
from dynmoe_ds.export.manifest import LayerManifest
from dynmoe_ds.export.model import build_layer, describe_layer
from dynmoe_ds.models import shared_expert
from dynmoe_ds.moe import moe_layers

HUGGING_FACE_FILE = "config.json"
PREFIX = "dynmoe_"
"""What the model types begin with: a Llama with experts is a `dynmoe_llama`."""

KINDS = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "StableLmForCausalLM",
    "GemmaForCausalLM", "PhiForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
    "LlavaForConditionalGeneration",
)  # fmt: skip
"""The classes of transformers that can have experts."""


def register_auto_classes() -> None:
    """Let transformers' Auto classes read what `export_hugging_face` writes.

    dm.register_auto_classes()
    model = AutoModelForCausalLM.from_pretrained(folder)  # or AutoModelForImageTextToText for a Llava
    """
    for name in KINDS:
        kind = moe_class(getattr(transformers, name))
        config: Any = kind.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        auto: Any = (
            AutoModelForImageTextToText if issubclass(kind, LlavaForConditionalGeneration) else AutoModelForCausalLM
        )
        auto.register(config, kind, exist_ok=True)


def export_hugging_face(model: PreTrainedModel, folder: str | Path, beside: Sequence[Path] = ()) -> None:
    """Write a model with `MoELayer`s into a new folder: `config.json`, safetensors, and nothing of free slots.

    model: on one rank, of a class in `KINDS`, such as `load_model` gives. beside: files to copy into the folder.
    `moe_class(type(model)).from_pretrained` reads it, and transformers' Auto classes do after `register_auto_classes`.
    Raises: ConfigError for a model of another class, spread over ranks, or whose layers have modules that no file
    describes; CheckpointError if the folder is in use or cannot be written.
    """
    if type(model).__name__ not in KINDS:
        raise ConfigError(f"The model is a {type(model).__name__}. Export one of {', '.join(KINDS)}.")
    layers = moe_layers(model)
    if spread := [name for name, layer in layers.items() if layer.ep_size > 1]:
        raise ConfigError(f"{spread[0]} is spread over ranks. Export what dynmoe_ds.load_model gives on one rank.")
    described = {name: describe_layer(layer, model.config.to_dict()) for name, layer in layers.items()}
    if unknown := [name for name, it in described.items() if it.has_shared and not it.shared_ffn_hidden_size]:
        raise ConfigError(
            f"{unknown[0]} has a shared module that is no MLP as Llama's, which no configuration describes."
        )
    kind = moe_class(model.__class__)
    has_bias = getattr(model.get_output_embeddings(), "bias", None) is not None
    plain = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    exported = kind(kind.config_class(**plain, output_bias=has_bias, moe_layers=_plain(described)))
    exported.to(model.dtype)
    exported.load_state_dict(_without_free_slots(model))
    exported.generation_config = model.generation_config
    check_vacant(Path(folder))
    try:
        with published(Path(folder)) as aside:
            exported.save_pretrained(aside)
            for file in beside:
                shutil.copy(file, aside)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The model cannot be written to {folder}: {error}. Nothing is left of it.") from error


def load_hugging_face(folder: str | Path) -> PreTrainedModel:
    """The model in a folder of `export_hugging_face`, or in another of Hugging Face's format: on the CPU, evaluating.

    A decoder of text, or else a vision-language model, in the dtype of its files. Nothing is downloaded.
    Raises: CheckpointError for a folder that holds no such model.
    """
    register_auto_classes()
    model_type = _model_type(Path(folder))
    if model_type is not None and model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder} holds a model of type {model_type}, which transformers does not know. `dynmoe import` reads "
            "published checkpoints of DynMoE and MoE-LLaVA; of another model, name a folder of `dynmoe export`."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        kind: Any = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise whatever the first wrong byte leads to
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{folder} holds no model that can be loaded ({told}). Name a whole folder of `dynmoe export`, or write it "
            "again."
        ) from error


def _model_type(folder: Path) -> str | None:
    """What `config.json` says; None where it says nothing that can be read."""
    try:
        found = json.loads((folder / HUGGING_FACE_FILE).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


@cache
def moe_class(kind: Any) -> Any:
    """The class of transformers `kind` with the experts that `config.moe_layers` describes in the place of MLPs.

    Its `parent_class` is `kind`.
    """
    parent: Any = kind.config_class
    config_class = type(
        f"DynMoE{parent.__name__}",
        (parent,),
        {"model_type": f"{PREFIX}{parent.model_type}", "moe_layers": {}, "output_bias": False},
    )

    def __init__(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        if config.output_bias and self.lm_head.bias is None:  # as a Llava's on Phi, which LlavaConfig cannot say
            self.lm_head = nn.Linear(self.lm_head.in_features, self.lm_head.out_features)
        for name, layer in config.moe_layers.items():
            # from_pretrained builds models without memory; a layer has values that must be there from the start.
            with torch.device("cpu"):
                described = _layer(layer)
                built = build_layer(name, described, Path(str(config.name_or_path)), ep_size=1, num_slots=None)
                built.shared = shared_expert(
                    config, described.shared_ffn_hidden_size, is_gated=described.shared_is_gated
                )
            self.set_submodule(name, built)

    return type(
        f"DynMoE{kind.__name__}",
        (kind,),
        {"__init__": __init__, "config_class": config_class, "parent_class": kind},
    )


def _plain(layers: Mapping[str, LayerManifest]) -> dict[str, Any]:
    return {name: asdict(layer) | {"expert_ids": list(layer.expert_ids)} for name, layer in layers.items()}


def _layer(plain: Mapping[str, Any]) -> LayerManifest:
    return LayerManifest(**{**plain, "expert_ids": tuple(plain["expert_ids"])})


def _without_free_slots(model: nn.Module) -> dict[str, Any]:
    """The state dict, with the rows of live experts alone, in the order of their ids."""
    state = dict(model.state_dict())
    for name, layer in moe_layers(model).items():
        slots = [slot for _, slot in sorted(layer.placement.slots_by_id.items())]
        of_slots = {f"experts.{key}" for key, _ in layer.experts.named_parameters()}
        of_slots |= {f"router.{key}" for key in (*layer.router.slot_parameters(), *layer.router.slot_buffers)}
        for key in (*of_slots, "active", "expert_ids"):
            state[f"{name}.{key}"] = state[f"{name}.{key}"][slots]
    return state
