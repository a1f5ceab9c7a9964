"""A GPTModel of megatron-core with `MoELayer`s, small, on CPUs, trained for some steps that grow experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import dynmoe_ds as dm
from dynmoe_ds.integrations.megatron import MegatronGroups, megatron_module, moe_layer_spec
from tests.helpers.models import deepspeed_config

WORDS, SEQUENCES, LENGTH, STEPS = 32, 4, 6, 6


class Attention(nn.Module):
    """Causal attention by torch: Megatron's own wants CUDA."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[L, B, heads, d] each -> [L, B, heads d]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


class Gpt(nn.Module):
    """Gives the mean loss of the next token. The groups of megatron-core are initialised."""

    def __init__(self, ep_size: int, tp_size: int, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        specs = megatron_module("models.gpt.gpt_layer_specs", "this test")
        spec = specs.get_gpt_layer_local_spec()
        spec.submodules.self_attention.submodules.core_attention = Attention
        spec.submodules.mlp = moe_layer_spec(
            num_experts=3, num_slots=8, ep_size=ep_size, expert="gelu", router=dm.TopAnyConfig(diversity_weight=0.1)
        )
        config = megatron_module("transformer.transformer_config", "this test").TransformerConfig(
            num_layers=2, hidden_size=16, num_attention_heads=4, ffn_hidden_size=24, hidden_dropout=0.0,
            attention_dropout=0.0, bias_dropout_fusion=False, use_cpu_initialization=True,
            tensor_model_parallel_size=tp_size, **changes,
        )  # fmt: skip
        self.model = megatron_module("models.gpt", "this test").GPTModel(
            config, spec, vocab_size=WORDS, max_sequence_length=LENGTH, position_embedding_type="learned_absolute"
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L + 1]."""
        positions = torch.arange(LENGTH, device=ids.device).expand(len(ids), LENGTH)
        loss: Tensor = self.model(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean()
        return loss


def train_gpt(ep_size: int, tp_size: int) -> dict[str, Any]:
    """The mean loss of every step on the same few sentences, and the live experts by layer after each."""
    mpu = MegatronGroups()
    adaptation = dm.AdaptationConfig(every_steps=3, window_steps=3)
    engine = dm.initialize(Gpt(ep_size, tp_size), deepspeed_config(1), adaptation, mpu=mpu)
    ids = torch.randint(WORDS, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(6))
    losses, live = [], []
    for _ in range(STEPS):
        loss = engine(ids.chunk(mpu.get_data_parallel_world_size())[mpu.get_data_parallel_rank()])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
        live.append({name: placement.live_ids for name, placement in engine.placements().items()})
    return {"losses": losses, "live": live, "norm": engine.gradient_norm()}
