"""The first Qwen (`QWenLMHeadModel`), which transformers has no class for, as its Qwen2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import Qwen2Config

from dynmoe_ds.export.weight_files import View

_MODULES = {
    "wte": "embed_tokens",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    # w1(x) * silu(w2(x)): the second one is the gate.
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_MLP = {"w1": "up_proj", "w2": "gate_proj", "c_proj": "down_proj"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_EXPERT = re.compile(r"(.+\.deepspeed_experts\.\d+)\.(w1|w2|c_proj)\.weight")

# What Qwen2 computes otherwise, with the one value of each at which it does not.
_MUST_BE = {
    "rotary_pct": 1.0,
    "no_bias": True,
    "scale_attn_weights": True,
    "emb_dropout_prob": 0.0,
    "use_cache_quantization": False,
}
_ADVICE = {"emb_dropout_prob": " It counts in training alone: set it to 0.0 to go on without."}


def qwen2_config(told: Mapping[str, Any]) -> Qwen2Config:
    """Qwen2's configuration of what a first Qwen's `config.json` describes; `faults_of_qwen_v1` finds nothing in it.

    The two compute the same up to `seq_length` tokens, if that is where dynamic NTK or log-n attention begin.
    """
    heads, stretched = told["num_attention_heads"], told.get("use_dynamic_ntk") or told.get("use_logn_attn")
    return Qwen2Config(
        vocab_size=told["vocab_size"],
        hidden_size=told["hidden_size"],
        intermediate_size=told["intermediate_size"] // 2,  # of gate and hidden units together
        num_hidden_layers=told["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        hidden_act="silu",
        rms_norm_eps=told.get("layer_norm_epsilon", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": float(told.get("rotary_emb_base", 10000))},
        max_position_embeddings=told["seq_length"] if stretched else max(told["seq_length"], _positions(told)),
        attention_dropout=told.get("attn_dropout_prob", 0.0),
        initializer_range=told.get("initializer_range", 0.02),
        tie_word_embeddings=bool(told.get("tie_word_embeddings", False)),
        bos_token_id=told.get("bos_token_id"),
        eos_token_id=told.get("eos_token_id"),
    )


def _positions(told: Mapping[str, Any]) -> int:
    return int(told.get("max_position_embeddings") or 0)


def faults_of_qwen_v1(told: Mapping[str, Any]) -> list[str]:
    """What a first Qwen's `config.json` says that Qwen2 cannot compute, a sentence each."""
    found = [
        f"{key} is {told[key]!r}, but Qwen2 computes what it does with {value!r}.{_ADVICE.get(key, '')}"
        for key, value in _MUST_BE.items()
        if key in told and told[key] != value
    ]
    width = told.get("kv_channels", 0) * told["num_attention_heads"]
    if width not in (0, told["hidden_size"]):
        found.append(
            f"kv_channels is {told['kv_channels']} for {told['num_attention_heads']} heads, but together they must be "
            f"as wide as hidden_size ({told['hidden_size']})."
        )
    return found


def qwen2_views(names: Iterable[str]) -> dict[str, View]:
    """What is stored under such names, by Qwen2's names: `c_attn` [3 D, D] in three, `transformer.` as `model.`."""
    views: dict[str, View] = {}
    for name in names:
        inner = name.removeprefix("transformer.")
        if inner == name:  # the output layer
            views[name] = View(name=name)
            continue
        inner = re.sub(r"^h\.(\d+)\.", r"layers.\1.", inner)
        start, own, parameter = _parted(inner)
        if own == "attn.c_attn":
            for index, projection in enumerate(_PROJECTIONS):
                new = f"model.{start}self_attn.{projection}.{parameter}"
                views[new] = View(name=name, index=index, parts=len(_PROJECTIONS))
        elif expert := _EXPERT.fullmatch(inner):
            views[f"model.{expert[1]}.{_MLP[expert[2]]}.weight"] = View(name=name)
        else:
            views[f"model.{start}{_MODULES.get(own, own)}.{parameter}"] = View(name=name)
    return views


def _parted(inner: str) -> tuple[str, str, str]:
    """`layers.3.mlp.w1.weight` as `layers.3.`, `mlp.w1` and `weight`."""
    found = re.fullmatch(r"(layers\.\d+\.)?(.+)\.([^.]+)", inner)
    return (found[1] or "", found[2], found[3]) if found else ("", inner, "")
