"""How many floating-point operations a token costs, from the model's sizes and the measured number of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from dynmoe_ds.moe import MoELayer, moe_layers
from dynmoe_ds.routing import Router

PER_WEIGHT = 2  # a multiplication and an addition
BACKWARD = 2  # gradients of a product's two factors: each costs as much as the product
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ENCODERS = {"vision_tower", "multi_modal_projector"}  # of a Llava: they see images, not tokens
HEADS = {"pooler", "classifier"}  # what Hugging Face calls the parts of a classifier that see one vector per sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopCount:
    """Floating-point operations of matrix products per token, by the place where they are done.

    linear: 2 for every weight of a linear map or convolution outside the experts and routers, the output layer
    included, an embedding that is looked up not; a classifier's head works once per L tokens and counts 1/L.
    attention: 4·L·A per attention layer whose heads have A dimensions together: scores and weighted sum over all L
    tokens, which is what kernels without a causal short cut do; one with it does about half. routers: 2·D per slot of
    the pool, a free one too, and per null expert. per_expert: by layer, what one expert costs one token, which is 2 for
    every weight of it.

    Left out because they are no matrix products or are done once per pass: norms, softmax, activations, rotary
    embeddings, combining, auxiliary losses, records.
    """

    linear: float
    attention: int
    routers: int
    per_expert: Mapping[str, int]

    def forward(self, mean_k: Mapping[str, float]) -> float:
        """FLOPs of a token's forward pass, where `mean_k` is the mean number of experts per token by layer."""
        experts = sum(mean_k[layer] * flops for layer, flops in self.per_expert.items())
        return self.linear + self.attention + self.routers + experts

    def training(self, mean_k: Mapping[str, float]) -> float:
        """FLOPs of a token in training, three times the forward pass; recomputation to save memory is not in it."""
        return (1 + BACKWARD) * self.forward(mean_k)


def count_flops(model: nn.Module, sequence_length: int) -> FlopCount:
    """The count of a Hugging Face model of Linear, Conv and MoELayer modules for sequences of `sequence_length` tokens.

    Attention is read from `model.config` (`num_hidden_layers`, `num_attention_heads`, `head_dim` or `hidden_size`); a
    model without one has none. Of a vision-language model it is the language model's. Count before ZeRO-3 splits the
    parameters.
    """
    layers = moe_layers(model)
    parts = [part for layer in layers.values() for part in (layer.router, layer.experts)]
    inside = {id(module) for part in parts for module in part.modules()}
    named = model.named_modules()
    encoders = {id(module) for name, module in named if not ENCODERS.isdisjoint(name.split("."))}
    linear = 0.0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and id(module) not in inside | encoders:
            is_head = not HEADS.isdisjoint(name.split("."))
            linear += module.weight.numel() / (sequence_length if is_head else 1)
    return FlopCount(
        linear=PER_WEIGHT * linear,
        attention=_attention(model, sequence_length),
        routers=PER_WEIGHT * sum(_gate_weights(layer.router) for layer in layers.values()),
        per_expert={name: PER_WEIGHT * _weights_per_expert(layer) for name, layer in layers.items()},
    )


def _attention(model: nn.Module, sequence_length: int) -> int:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    num_heads = getattr(config, "num_attention_heads", None)
    if num_heads is None:
        return 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return 2 * PER_WEIGHT * sequence_length * num_heads * head_dim * config.num_hidden_layers


def _gate_weights(router: Router) -> int:
    return sum(param.numel() for param in router.parameters() if param.dim() == 2)


def _weights_per_expert(layer: MoELayer) -> int:
    """Weights of the matrices of one expert: stacked parameters [s, M, N]; biases are [s, M]."""
    return sum(param[0].numel() for param in layer.experts.parameters() if param.dim() == 3)
