"""What all tokens of a layer pass beside the experts that they choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP

from dynmoe_ds.models.random_weights import seeded_weights


class GatedSharedExpert(nn.Module):
    """`σ(gate x) · expert(x)`: what every token passes beside its experts in Qwen2-MoE. gate: [T, D] -> [T, 1]."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert = expert
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] for x [T, D]."""
        output: Tensor = torch.sigmoid(self.gate(x)) * self.expert(x)
        return output


def shared_expert(
    decoder: PreTrainedConfig, ffn_hidden_size: int, *, is_gated: bool = False, seed: int = 0
) -> nn.Module | None:
    """The MLP that all tokens of a decoder's MoELayer pass, with random weights as its others; None for 0 units.

    is_gated: behind a gate, as in Qwen2-MoE.
    """
    if ffn_hidden_size == 0:
        return None
    with seeded_weights(seed):
        mlp = LlamaMLP(LlamaConfig.from_dict(decoder.to_dict() | {"intermediate_size": ffn_hidden_size}))
        shared = GatedSharedExpert(mlp, nn.Linear(mlp.hidden_size, 1, bias=False)) if is_gated else mlp
        for linear in shared.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=decoder.initializer_range)
    return shared


def shared_ffn_hidden_size(shared: nn.Module | None, config: Mapping[str, Any]) -> int:
    """Hidden units of a module as `shared_expert` makes it of the decoder's `config`; 0 for any other."""
    mlp: Any = shared.expert if isinstance(shared, GatedSharedExpert) else shared  # transformers has no types
    if type(mlp) not in (LlamaMLP, Qwen2MoeMLP):
        return 0
    has_bias = getattr(mlp.config, "mlp_bias", False) == config.get("mlp_bias", False)
    alike = has_bias and all(getattr(mlp.config, key) == config.get(key) for key in ("hidden_size", "hidden_act"))
    return int(mlp.intermediate_size) if alike else 0
