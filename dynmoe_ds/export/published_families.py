"""The decoders that DynMoE's and MoE-LLaVA's authors built on, as transformers' classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.export.qwen_v1 import faults_of_qwen_v1, qwen2_config, qwen2_views
from dynmoe_ds.export.weight_files import View


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A decoder that the authors built on. needs: keys that its `config.json` must have.

    views: what is stored, by the names of `kind`. faults: what `kind` cannot compute of a `config.json`.
    """

    kind: Any
    model_types: tuple[str, ...]
    needs: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], PreTrainedConfig]
    views: Callable[[Iterable[str]], dict[str, View]]
    faults: Callable[[Mapping[str, Any]], list[str]]


def _same_names(names: Iterable[str]) -> dict[str, View]:
    return {name: View(name=name) for name in names}


def _stablelm_config(told: Mapping[str, Any]) -> PreTrainedConfig:
    """Of StableLM's own code before transformers had it, which called two values otherwise."""
    config: PreTrainedConfig = StableLmConfig.from_dict(
        _sizes(told)
        | {
            "num_key_value_heads": told.get("num_key_value_heads") or told["num_attention_heads"],
            "hidden_act": told.get("hidden_act", "silu"),
            "layer_norm_eps": told.get("norm_eps", told.get("layer_norm_eps", 1e-5)),
            "partial_rotary_factor": told.get("rope_pct", told.get("partial_rotary_factor", 0.25)),
            "rope_theta": told.get("rope_theta", 10000),
            "max_position_embeddings": told.get("max_position_embeddings", 4096),
            "use_qkv_bias": told.get("use_qkv_bias", True),
        }
    )
    return config


def _phi_config(told: Mapping[str, Any]) -> PreTrainedConfig:
    keys = (
        "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_act", "max_position_embeddings", "layer_norm_eps",
        "num_key_value_heads", "rope_theta", "partial_rotary_factor", "qk_layernorm",
    )  # fmt: skip
    config: PreTrainedConfig = PhiConfig.from_dict(_sizes(told) | {key: told[key] for key in keys if key in told})
    return config


def _sizes(told: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("initializer_range", "bos_token_id", "eos_token_id")
    return (
        {key: told[key] for key in _NEEDED}
        | {key: told[key] for key in kept if told.get(key) is not None}
        | {"tie_word_embeddings": bool(told.get("tie_word_embeddings", False))}
    )


def _stretched_rotary(told: Mapping[str, Any]) -> list[str]:
    if told.get("rope_scaling") is None:
        return []
    return [f"rope_scaling is {told['rope_scaling']}, but only unscaled rotary embeddings are read."]


_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FAMILIES = {
    "stablelm": Family(
        kind=StableLmForCausalLM,
        model_types=("moe_llava_stablelm", "llava_stablelm", "stablelm_epoch"),
        needs=_NEEDED,
        config=_stablelm_config,
        views=_same_names,
        faults=_stretched_rotary,
    ),
    "phi": Family(
        kind=PhiForCausalLM,
        model_types=("moe_llava_phi", "llava_phi"),
        needs=_NEEDED,
        config=_phi_config,
        views=_same_names,
        faults=_stretched_rotary,
    ),
    "qwen": Family(
        kind=Qwen2ForCausalLM,
        model_types=("moe_llava_qwen", "llava_qwen", "qwen"),
        needs=(*_NEEDED, "seq_length"),
        config=qwen2_config,
        views=qwen2_views,
        faults=faults_of_qwen_v1,
    ),
}


def published_family(told: Mapping[str, Any], path: Path) -> Family:
    """By the type of model, or else the class's name, such as `EvalMoELLaVAPhiForCausalLM`.

    Raises: ConfigError for another, for keys that are missing, and for what transformers' class cannot compute.
    """
    by_type = {model_type: family for family in _FAMILIES.values() for model_type in family.model_types}
    found = by_type.get(f"{told.get('model_type')}")
    architectures = told.get("architectures") or []
    if found is None:
        # Not Qwen1.5, Qwen2 or Phi-3, which are other models.
        name = re.search(r"(stablelm|phi|qwen)(for|lmhead)", " ".join(architectures).lower())
        found = _FAMILIES[name[1]] if name else None
    if found is None:
        raise ConfigError(
            f"{path} has model_type {told.get('model_type')!r} and architectures {architectures}. Known are "
            f"{', '.join(by_type)}, and classes named after StableLM, Phi and the first Qwen. For another decoder "
            "build its model and use dynmoe_ds.import_dynmoe_checkpoint."
        )
    faults = [f"it has no {key}." for key in found.needs if told.get(key) is None] or found.faults(told)
    if faults:
        raise ConfigError([f"{path}: {fault}" for fault in faults])
    return found
