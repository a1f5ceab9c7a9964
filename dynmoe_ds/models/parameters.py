"""How a model's parameters are grouped for the optimiser, and how many there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dynmoe_ds.moe import moe_layers

# By name, because stacked expert biases have one dimension more than the biases they stack.
UNDECAYED_NAMES = ("bias", "b1", "b2", "threshold")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter in one of two groups, `decay` and `no_decay`; a group without parameters is left out.

    Norms, biases and router thresholds are not decayed: decay would pull a threshold towards 0 whatever the data say.
    A group is a dict of `name`, `params` and `weight_decay`, as DeepSpeed takes it.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_undecayed = parameter.dim() < 2 or name.rpartition(".")[2] in UNDECAYED_NAMES
            (no_decay if is_undecayed else decay).append(parameter)
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of the whole model, over all expert-parallel ranks.

    in_slots: with every slot of the pool, free ones too, which is what memory must hold. live: with live experts only.
    By layer: num_live, the live experts; per_expert, the parameters of one; per_router_row, those of its router row.
    """

    in_slots: int
    live: int
    live_without_experts: int
    num_live: Mapping[str, int]
    per_expert: Mapping[str, int]
    per_router_row: Mapping[str, int]

    def active_per_token(self, mean_k: Mapping[str, float], num_live: Mapping[str, int] | None = None) -> float:
        """Parameters that an average token meets: all but the experts, the router rows of live ones, and its experts.

        A table of embeddings counts whole, also one that is only looked up, as in the numbers that papers give.
        By layer: mean_k, the mean number of experts per token; num_live, the live experts, None for as many as counted.
        """
        num_live = self.num_live if num_live is None else num_live
        born = {name: num_live[name] - counted for name, counted in self.num_live.items()}
        return self.live_without_experts + sum(
            mean_k[name] * size + born[name] * self.per_router_row[name] for name, size in self.per_expert.items()
        )


def count_parameters(model: nn.Module, ep_size: int) -> ParameterCount:
    """Counts of a model that holds `1 / ep_size` of each MoELayer's experts; a tied parameter counts once.

    The live counts follow `MoELayer.active` as it is now. Count before ZeRO-3 splits the parameters.
    """
    layers = moe_layers(model)
    num_live: dict[str, int] = {}
    per_expert: dict[str, int] = {}
    per_router_row: dict[str, int] = {}
    in_slots = sum(parameter.numel() for parameter in model.parameters())
    num_free = num_live_experts = 0
    for name, layer in layers.items():
        num_slots = layer.active.numel()
        held_here = sum(parameter.numel() for parameter in layer.experts.parameters())
        num_live[name] = int(layer.active.sum())
        per_router_row[name] = sum(param.numel() for param in layer.router.slot_parameters().values()) // num_slots
        per_expert[name] = held_here * ep_size // num_slots
        in_slots += held_here * (ep_size - 1)
        num_free += (num_slots - num_live[name]) * (per_expert[name] + per_router_row[name])
        num_live_experts += num_live[name] * per_expert[name]
    live = in_slots - num_free
    return ParameterCount(
        in_slots=in_slots,
        live=live,
        live_without_experts=live - num_live_experts,
        num_live=num_live,
        per_expert=per_expert,
        per_router_row=per_router_row,
    )
