"""Mixtral and Qwen's mixtures of experts as models with `MoELayer`s, whose pools may have room for more experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from dynmoe_ds.distributed import current_layout, raise_together
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.models import GatedSharedExpert
from dynmoe_ds.moe import MoELayer
from dynmoe_ds.moe.layer import layer_faults
from dynmoe_ds.moe.seeds import layer_seed
from dynmoe_ds.routing import TopKConfig

M = TypeVar("M", bound=nn.Module)

_BLOCKS = (MixtralSparseMoeBlock, Qwen2MoeSparseMoeBlock, Qwen3MoeSparseMoeBlock)
_KINDS = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}
"""The kind of expert for an activation as transformers calls it."""


def import_top_k_model(model: M, num_slots: int | None = None, ep_size: int = 1, seed: int = 0) -> M:
    """`model` itself, a Mixtral, Qwen2-MoE or Qwen3-MoE of transformers, with `MoELayer`s for its sparse blocks.

        model = dm.import_top_k_model(MixtralForCausalLM.from_pretrained(folder), num_slots=16)

    It computes what it computed before, and its experts, 0, 1, … as before, can now grow in number, be pruned and move.
    The router is `top_k` with the model's k and its own rule for the weights. Qwen2-MoE's shared expert becomes the
    layer's `shared`. Dense layers, dtype, device and `requires_grad` stay; the experts of a block go as soon as its
    layer has them, so that at most one block is in memory twice.

    num_slots: slots per layer; None takes the least that holds the experts. ep_size: as in `MoELayer`. seed: what is
    drawn for later experts is a function of it, of the layer and of the expert's id.

    The router's scores are float32 also in a 16-bit model, where transformers rounds them to 16 bits. The auxiliary
    loss is `TopKConfig`'s, at its default weight, and not the model's, which needs the blocks that are gone.

    Collective if `ep_size` is above 1: every rank. Raises: ConfigError for a model without such blocks, for one that
    routes as `top_k` cannot, or for sizes that cannot work; the model is unchanged then. With `ep_size` above 1 one
    rank's error is raised on every rank.
    """
    error: Exception | None = None
    blocks: dict[str, _Block] = {}
    try:
        blocks = _checked_blocks(model, num_slots, ep_size)
        current_layout(ep_size)  # raises if the ranks do not fit
    except Exception as e:
        error = e
    if ep_size > 1:
        raise_together(error)
    elif error is not None:
        raise error
    for path, block in blocks.items():
        layer = _empty_layer(block, num_slots, ep_size, seed)
        _fill(layer, block)
        model.set_submodule(path, layer.train(block.module.training))
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """A sparse block: gate.weight [K, D], experts.gate_up_proj [K, 2F, D] (gate, then up), experts.down_proj [K, D, F].

    index: of its decoder layer. renormalize: whether the weights of a token's k choices are made to sum to 1.
    """

    module: Any  # transformers has no types
    index: int
    kind: str
    renormalize: bool

    @property
    def num_experts(self) -> int:
        return len(self.module.gate.weight)


def _checked_blocks(model: nn.Module, num_slots: int | None, ep_size: int) -> dict[str, _Block]:
    """The sparse blocks by path. Raises: ConfigError with everything that is in the way."""
    modules = {path: module for path, module in model.named_modules() if type(module) in _BLOCKS}
    if not modules:
        raise ConfigError(
            f"{type(model).__name__} has no sparse block of a known class. Known are "
            f"{', '.join(block.__name__ for block in _BLOCKS)} of transformers; a dense model becomes a mixture of "
            "experts by dynmoe_ds.upcycle."
        )
    faults, blocks = [], {}
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        faults.append(
            "config.output_router_logits is True, but a MoELayer gives no router logits to the model's own auxiliary "
            "loss. Set it to False: the layer's auxiliary losses take its place."
        )
    for position, (path, module) in enumerate(modules.items()):
        found = _block_faults(path, module)
        num_experts = len(module.gate.weight)
        slots = _least_slots(num_experts, ep_size) if num_slots is None else num_slots
        if slots < num_experts:
            found.append(f"num_slots is {slots} but {path} has {num_experts} experts. Use {num_experts} or more.")
        else:
            found += layer_faults(num_experts=num_experts, num_slots=slots, ep_size=ep_size)
        faults += [fault for fault in found if fault not in faults]
        if not found:
            blocks[path] = _Block(
                module=module,
                index=next((int(part) for part in path.split(".") if part.isdigit()), position),
                kind=_KINDS[module.experts.config.hidden_act],
                renormalize=_renormalizes(module),
            )
    if faults:
        raise ConfigError(faults)
    return blocks


def _block_faults(path: str, module: Any) -> list[str]:
    """What `top_k` and our experts cannot do of what the block does, a sentence each."""
    found = []
    activation = module.experts.config.hidden_act
    if activation not in _KINDS:
        found.append(f"{path} has the activation {activation}, but experts have {', '.join(_KINDS)} only.")
    if module.gate.top_k == 1 and _renormalizes(module):
        found.append(
            f"{path} takes one expert per token with the constant weight 1, but top_k gives a single choice its "
            "probability as weight. Set num_experts_per_tok to 2 or more."
        )
    if getattr(module, "jitter_noise", 0) > 0:
        found.append(
            f"{path} multiplies its input in training by noise of router_jitter_noise {module.jitter_noise}, which "
            "top_k does not. Set the block's jitter_noise to 0."
        )
    return found


def _renormalizes(module: Any) -> bool:
    """Mixtral always does, Qwen by its setting."""
    return type(module) is MixtralSparseMoeBlock or bool(module.gate.norm_topk_prob)


def _least_slots(num_experts: int, ep_size: int) -> int:
    """The smallest multiple of `ep_size` that holds the experts."""
    ranks = max(ep_size, 1)
    return -(-num_experts // ranks) * ranks


def _empty_layer(block: _Block, num_slots: int | None, ep_size: int, seed: int) -> MoELayer:
    """The layer of a block, where its weights go; with the block's shared expert."""
    module = block.module
    shared = None
    if isinstance(module, Qwen2MoeSparseMoeBlock):
        shared = GatedSharedExpert(module.shared_expert, module.shared_expert_gate)
    down = module.experts.down_proj
    layer = MoELayer(
        hidden_size=down.shape[1],
        ffn_hidden_size=down.shape[2],
        num_experts=block.num_experts,
        num_slots=_least_slots(block.num_experts, ep_size) if num_slots is None else num_slots,
        ep_size=ep_size,
        router=TopKConfig(k=module.gate.top_k, renormalize=block.renormalize),
        expert=block.kind,
        seed=layer_seed(seed, block.index),
        shared=shared,
    )
    return layer.to(device=down.device, dtype=down.dtype)


@torch.no_grad()
def _fill(layer: MoELayer, block: _Block) -> None:
    """Give every expert of this rank its weights, and the router all rows."""
    gate, experts = block.module.gate, block.module.experts
    inner, first = layer.ffn_hidden_size, layer.local_slots.start
    sources = {
        "w1": experts.gate_up_proj[:, :inner],
        "w3": experts.gate_up_proj[:, inner:],
        "w2": experts.down_proj,
    }
    for expert_id, slot in layer.placement.slots_by_id.items():
        layer.router.weight[slot] = gate.weight[expert_id]
        if slot in layer.local_slots:
            for name, source in sources.items():
                layer.experts.get_parameter(name)[slot - first] = source[expert_id]
    layer.router.weight.requires_grad_(gate.weight.requires_grad)
    for name in sources:
        stacked = experts.down_proj if name == "w2" else experts.gate_up_proj
        layer.experts.get_parameter(name).requires_grad_(stacked.requires_grad)
