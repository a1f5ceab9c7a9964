"""The first Qwen in plain torch: small weights under its own names, and its formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.dynmoe_layout import E, authors_layer

D, HEADS, INNER, LAYERS, VOCAB = 16, 2, 24, 3, 40
CONFIG: dict[str, Any] = {
    "architectures": ["MoELLaVAQWenForCausalLM"], "model_type": "moe_llava_qwen", "vocab_size": VOCAB,
    "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 2 * INNER,
    "kv_channels": D // HEADS, "layer_norm_epsilon": 1e-4, "rotary_emb_base": 500, "rotary_pct": 1.0, "no_bias": True,
    "seq_length": 12, "max_position_embeddings": 32, "use_dynamic_ntk": True, "use_logn_attn": True,
    "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "scale_attn_weights": True, "softmax_in_fp32": False,
    "bf16": True, "fp16": False, "fp32": False, "use_flash_attn": "auto", "tie_word_embeddings": False,
    "onnx_safe": None, "eos_token_id": 3,
}  # fmt: skip


class QwenMLP(nn.Module):
    """The first Qwen's: `c_proj(w1 x * silu(w2 x))`."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(D, INNER, bias=False), nn.Linear(D, INNER, bias=False)
        self.c_proj = nn.Linear(INNER, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


def tensors_of_qwen(layers_with_experts: dict[int, list[float]]) -> dict[str, Tensor]:
    """Random weights of a first Qwen, with experts in some layers, by the names that its authors and DynMoE's give."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return 0.4 * torch.randn(shape, generator=generator)

    found = {"transformer.wte.weight": draw(VOCAB, D), "lm_head.weight": draw(VOCAB, D)}
    found["transformer.ln_f.weight"] = 1 + draw(D)
    shapes = {"w1.weight": (INNER, D), "w2.weight": (INNER, D), "c_proj.weight": (D, INNER)}
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}."
        found |= {f"{block}ln_1.weight": 1 + draw(D), f"{block}ln_2.weight": 1 + draw(D)}
        found |= {f"{block}attn.c_attn.weight": draw(3 * D, D), f"{block}attn.c_attn.bias": draw(3 * D)}
        found[f"{block}attn.c_proj.weight"] = draw(D, D)
        if layer not in layers_with_experts:
            found |= {f"{block}mlp.{name}": draw(*shape) for name, shape in shapes.items()}
            continue
        for index in range(E):
            start = f"{block}mlp.deepspeed_moe.experts.deepspeed_experts.{index}."
            found |= {start + name: draw(*shape) for name, shape in shapes.items()}
        gate = f"{block}mlp.deepspeed_moe.gate.wg."
        found |= {f"{gate}sim_matrix": draw(D, E), f"{gate}gates": 0.3 * torch.rand(E, generator=generator) - 0.1}
        found |= {f"{gate}experts_mask": torch.tensor(layers_with_experts[layer]), f"{gate}temperature": torch.zeros(1)}
    return found


def reference_logits(tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Logits [L, V] for embeddings [L, D], in float64, by the formulas of the first Qwen's `modeling_qwen.py`."""
    read = {name: tensor.double() for name, tensor in tensors.items()}
    length, width = len(hidden), D // HEADS
    frequencies = 500.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4) * read[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        first, second = x[:, : width // 2], x[:, width // 2 :]
        return x * angles.cos() + torch.cat([-second, first], 1) * angles.sin()

    for layer in range(LAYERS):
        block = f"transformer.h.{layer}."
        x = norm(hidden, f"{block}ln_1")
        query, key, value = (x @ read[f"{block}attn.c_attn.weight"].T + read[f"{block}attn.c_attn.bias"]).split(D, 1)
        heads = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            scores = rotated(query[:, part]) @ rotated(key[:, part]).T / math.sqrt(width)
            scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), -math.inf)
            heads.append(scores.softmax(1) @ value[:, part])
        hidden = hidden + torch.cat(heads, 1) @ read[f"{block}attn.c_proj.weight"].T
        x = norm(hidden, f"{block}ln_2")
        if f"{block}mlp.w1.weight" in read:
            w1, w2, out = (read[f"{block}mlp.{name}.weight"] for name in ("w1", "w2", "c_proj"))
            hidden = hidden + (x @ w1.T * F.silu(x @ w2.T)) @ out.T
        else:
            named = {name.replace("transformer.h.", "model.layers."): tensor for name, tensor in tensors.items()}
            hidden = hidden + authors_layer(named, layer, QwenMLP(), x)
    return norm(hidden, "transformer.ln_f") @ read["lm_head.weight"].T
