"""What of a model its cost depends on, counted without making its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from dynmoe_ds.config.schema import (
    LanguageDataConfig,
    LlamaModelConfig,
    MegatronIndexedConfig,
    RunConfig,
    TextDataConfig,
)
from dynmoe_ds.data.megatron_indexed import read_vocabulary
from dynmoe_ds.data.shard_index import read_index
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.experts import GatedExperts, build_experts
from dynmoe_ds.models import count_flops, decoder_backbone, shared_expert
from dynmoe_ds.routing import Router, RouterConfig, build_router

PER_WEIGHT = 2  # FLOPs: a multiplication and an addition


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder and the micro steps that it is trained in.

    hidden_size D; expert_ffn_hidden_size F; shared_ffn_hidden_size: that of an expert that all tokens pass. num_experts
    live ones E of num_slots S per layer with experts. is_gated: whether an expert has a gate beside its up-projection.
    mean_k: experts per token; is_exact_k: whether every token takes just as many, any as likely as any other, or each
    expert is chosen by itself. dense_tensors: numbers of elements of all parameters but the experts', routers included.
    expert_tensors: those of one slot of one layer. dense_flops: of a token's forward pass outside the experts;
    expert_flops: of one row in one expert.
    """

    hidden_size: int
    num_layers: int
    num_moe_layers: int
    num_heads: int
    dense_ffn_hidden_size: int
    expert_ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    vocab_size: int
    num_experts: int
    num_slots: int
    is_gated: bool
    mean_k: float
    is_exact_k: bool
    dense_tensors: tuple[int, ...]
    expert_tensors: tuple[int, ...]
    dense_flops: float
    expert_flops: int
    sequence_length: int
    micro_batch_size: int
    accumulation_steps: int

    @property
    def tokens(self) -> int:
        """T: of one rank in one micro step."""
        return self.sequence_length * self.micro_batch_size

    @property
    def dense_parameters(self) -> int:
        return sum(self.dense_tensors)

    def expert_parameters(self, ep_size: int) -> int:
        """Of all layers, on one rank."""
        return self.num_moe_layers * self.num_slots // ep_size * sum(self.expert_tensors)


def shape_of(config: RunConfig, mean_k: float | None) -> ModelShape:
    """The shape of a run's model. mean_k: None for what the router says.

    Raises: ConfigError for a model that is no decoder, a mean k that is not known or impossible; DataError for token
    shards without an index and a tokenizer that cannot be read.
    """
    sizes, data = config.model, config.data
    if not isinstance(sizes, LlamaModelConfig) or not isinstance(data, LanguageDataConfig):
        raise ConfigError(
            f"model.name is {sizes.name}, but only decoders (model.name llama) can be planned: the activations of "
            "other models are not counted yet."
        )
    k, is_exact = mean_k_of(config.router, sizes.num_experts, mean_k)
    if isinstance(data, TextDataConfig):
        vocab_size = data.vocab_size
    elif isinstance(data, MegatronIndexedConfig):
        vocab_size = read_vocabulary(data.tokenizer).size
    else:
        assert data.path is not None, "checked with the configuration"
        vocab_size = read_index(Path(data.path)).vocab_size
    with torch.device("meta"):
        backbone = LlamaForCausalLM(
            decoder_backbone(sizes, vocab_size, eos_token_id=0, max_length=data.sequence_length)
        )
        router = build_router(config.router, sizes.hidden_size, sizes.num_slots)
        experts = build_experts(config.expert.kind, 1, sizes.hidden_size, sizes.expert_ffn_hidden_size)
        for index in sizes.moe_layers():
            shared = shared_expert(backbone.config, sizes.shared_ffn_hidden_size)
            backbone.model.layers[index].mlp = shared or nn.Identity()
    num_moe_layers = len(sizes.moe_layers())
    flops = count_flops(backbone, data.sequence_length)
    tensors = [parameter.numel() for parameter in backbone.parameters()]
    tensors += [parameter.numel() for parameter in router.parameters()] * num_moe_layers
    return ModelShape(
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_moe_layers=num_moe_layers,
        num_heads=sizes.num_heads,
        dense_ffn_hidden_size=sizes.dense_ffn_hidden_size,
        expert_ffn_hidden_size=sizes.expert_ffn_hidden_size,
        shared_ffn_hidden_size=sizes.shared_ffn_hidden_size,
        vocab_size=vocab_size,
        num_experts=sizes.num_experts,
        num_slots=sizes.num_slots,
        is_gated=isinstance(experts, GatedExperts),
        mean_k=k,
        is_exact_k=is_exact,
        dense_tensors=tuple(tensors),
        expert_tensors=tuple(parameter.numel() for parameter in experts.parameters()),
        dense_flops=flops.linear + flops.attention + num_moe_layers * _gate_flops(router),
        expert_flops=PER_WEIGHT * sum(param.numel() for param in experts.parameters() if param.dim() == 3),
        sequence_length=data.sequence_length,
        micro_batch_size=config.training.micro_batch_size,
        accumulation_steps=config.training.gradient_accumulation_steps,
    )


def mean_k_of(router: RouterConfig, num_experts: int, given: float | None) -> tuple[float, bool]:
    """Experts per token, and whether every token takes just as many.

    A budget, a target or top-k says it; where several say so, what is `given` must not contradict. Null experts take
    choices away, so that k of top-k is then only a bound.

    Raises: ConfigError if nothing says it, or `given` is impossible.
    """
    said = _said_by(router)
    if given is not None:
        if not 0 < given <= num_experts:
            raise ConfigError(
                f"plan.mean_k is {given} but must be above 0 and at most model.num_experts ({num_experts})."
            )
        if said is not None and given != said:
            raise ConfigError(
                f"plan.mean_k is {given} but the router holds {said:g} experts per token by its own settings. Leave "
                "plan.mean_k out, or change the router's."
            )
        said_exactly = said is not None and _is_top_k(router)
        return given, said_exactly
    if said is None:
        raise ConfigError(
            "How many experts a token takes is not in the configuration: this router has no budget and no target, it "
            "comes to it in training. Give plan.mean_k, such as plan.mean_k=2."
        )
    return min(said, float(num_experts)), _is_top_k(router)


def _is_top_k(router: RouterConfig) -> bool:
    return hasattr(router, "k") and not getattr(router, "num_null_experts", 0)


def _said_by(router: RouterConfig) -> float | None:
    """Experts per token by the router's own settings; None if they leave it open."""
    budget: Any = getattr(router, "budget", None)
    if budget is not None:
        return float(budget.target_k)
    if _is_top_k(router):
        return float(router.k)  # type: ignore[attr-defined]
    target: float | None = getattr(router, "target_k", None)
    return target


def _gate_flops(router: Router) -> int:
    return PER_WEIGHT * sum(parameter.numel() for parameter in router.parameters() if parameter.dim() == 2)
