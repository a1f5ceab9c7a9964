"""Small checkpoints in the layout of DynMoE's authors, and their layer by their formulas in plain loops."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

import dynmoe_ds as dm

D, F, E, LAYERS = 16, 24, 4, 4
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that experts matter to the logits
}
MASKS = {0: [1.0, 0.0, 1.0, 1.0], 2: [0.0, 1.0, 0.0, 1.0]}
"""Experts by layer: even layers have them, as in the published models."""


def stablelm(**values: Any) -> Any:
    return StableLmForCausalLM(StableLmConfig(**(SIZES | {"use_qkv_bias": True} | values)))


def qwen2(**values: Any) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**(SIZES | {"tie_word_embeddings": True} | values)))


def phi(**values: Any) -> Any:
    return PhiForCausalLM(PhiConfig(**(SIZES | values)))


def gate(layer: int) -> str:
    return f"model.layers.{layer}.mlp.deepspeed_moe.gate.wg."


def expert(layer: int, index: int) -> str:
    return f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{index}."


def checkpoint(build: Callable[..., Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors in the authors' layout: experts in layers 0 and 2; some tokens have no gate open, some several."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    dense = build().state_dict()
    if build is qwen2:
        del dense["lm_head.weight"]  # tied
    found: dict[str, Tensor] = {}
    for name, value in dense.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(.+)", name)
        if match is None or int(match[1]) not in MASKS:
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            found[name] = value + (noise if value.is_floating_point() else 0)
            continue
        for index in range(E):
            found[expert(int(match[1]), index) + match[2]] = 0.3 * torch.randn(value.shape, generator=generator)
    for layer, mask in MASKS.items():
        found[gate(layer) + "sim_matrix"] = torch.randn(D, E, generator=generator)
        found[gate(layer) + "gates"] = 0.3 * torch.rand(E, generator=generator) - 0.1
        found[gate(layer) + "experts_mask"] = torch.tensor(mask)
        found[gate(layer) + "temperature"] = torch.tensor([0.0 if layer == 0 else 1.5])
    return found


def authors_layer(tensors: dict[str, Tensor], layer: int, mlp: nn.Module, x: Tensor, training: bool = False) -> Tensor:
    """y [T, D] for x [T, D] in float64, from the checkpoint's tensors by the authors' formulas, token by token."""
    read = {name: tensors[gate(layer) + name].double() for name in ("sim_matrix", "gates", "experts_mask")}
    log_scale = float(tensors[gate(layer) + "temperature"])
    scale = math.exp(min(log_scale, math.log(100)))
    experts = []
    for index in range(E):
        one = copy.deepcopy(mlp).double()
        start = expert(layer, index)
        one.load_state_dict({n.removeprefix(start): t.double() for n, t in tensors.items() if n.startswith(start)})
        experts.append(one)
    rows = []
    for h in x.double():
        scores, is_open = [], []
        for index in range(E):
            column = read["sim_matrix"][:, index]
            cosine = h @ column / max(h.norm(), 1e-12) / max(column.norm(), 1e-12)
            scores.append(float(torch.sigmoid(cosine * scale) * read["experts_mask"][index]))
            is_open.append(scores[-1] - float(torch.sigmoid(read["gates"][index] * scale)) > 0)
        chosen = [index for index in range(E) if is_open[index]]
        if not chosen and not training:
            chosen = [max(range(E), key=lambda index: scores[index])]
        y = torch.zeros(D, dtype=torch.float64)
        for index in chosen:
            y = y + experts[index](h) / len(chosen)
        rows.append(y)
    return torch.stack(rows)


def moe(model: Any) -> dict[int, dm.MoELayer]:
    return {i: layer.mlp for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, dm.MoELayer)}


class Hooked(nn.Module):
    """The authors' layer in a dense model's place."""

    def __init__(self, tensors: dict[str, Tensor], index: int, mlp: nn.Module) -> None:
        super().__init__()
        self.compute = lambda x: authors_layer(tensors, index, mlp, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.reshape(-1, D)).view(x.shape).to(x.dtype)


def halves(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[i::2]} for i in range(2)]


def write_weights(folder: Path, tensors: dict[str, Tensor], kind: str, shards: int, indexed: bool) -> None:
    start, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    parts = halves(tensors) if shards == 2 else [tensors]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"{start}-{number:05}-of-00002.{kind}" if shards == 2 else f"{start}.{kind}"
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if indexed:
        (folder / f"{start}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
