"""What is compared: a dense FFN, our layer with each router, and the layers of others with the same experts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynmoe_ds as dm
from benchmarks.layer.loads import Load, measure_load, set_loads, wanted_shares
from dynmoe_ds.routing import RouterConfig

ROUTERS = ("top_any", "top_any_recommended", "top_p", "relu", "expert_threshold")
"""Besides top_k, whose k is the cell's."""

DENSE, TOP_K, TOP_ANY, PADDED = "dense FFN", "ours: top_k", "ours: top_any", "top_any, padded"
DROPPING = "DeepSpeed MoE, dropping"
SAME_AS_TOP_K = ("DeepSpeed MoE, no dropping", "DeepSpeed AutoEP", "Mixtral, eager", "Mixtral, grouped_mm")
"""Peers that must give what our top_k layer gives."""

AUX_WEIGHT = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One comparison. k: mean number of experts per token. routing: `uniform` or `skewed`."""

    num_experts: int
    k: int
    routing: str
    dtype: str
    ffn_hidden_size: int

    @property
    def label(self) -> str:
        return f"E {self.num_experts}, k {self.k}, F {self.ffn_hidden_size}, {self.routing}, {self.dtype}"


@dataclass(kw_only=True, slots=True)
class Candidate:
    """run: gives y [T, D] and the auxiliary loss (None without one) of x [T, D]. module: whose parameters it trains.

    load: None without experts. dropped: share of all choices that are left out.
    """

    run: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    module: nn.Module
    load: Load | None = None
    dropped: float = 0.0


class DenseFFN(nn.Module):
    """`w2 (silu(w1 x) * (w3 x))` of one width."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.w2 = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PaddedTopAny(nn.Module):
    """Top-any as its authors compute it: every expert gets as many places as the busiest one has tokens.

    Tokens go to places, and outputs back, through one-hot tensors [T, E, C] and dense products. Router and experts are
    those of `layer`, whose output it must have.
    """

    def __init__(self, layer: dm.MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        routing = layer.router(x, layer.active, None)
        capacity = int(routing.mask.sum(0).max())
        place = routing.mask.cumsum(0) - 1
        is_at = (place[..., None] == torch.arange(capacity, device=x.device)) & routing.mask[..., None]
        combine = (routing.weights[..., None] * is_at).to(x.dtype)
        places = torch.einsum("tec,td->ecd", is_at.to(x.dtype), x)
        experts = layer.experts
        outputs = [
            F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, w3), w2)
            for rows, w1, w3, w2 in zip(
                places.unbind(0), experts.w1.unbind(0), experts.w3.unbind(0), experts.w2.unbind(0), strict=True
            )
        ]
        y = torch.einsum("tec,ecd->td", combine, torch.stack(outputs))
        weights = layer.router.aux_loss_weights()
        return y, torch.stack([weights[name] * value for name, value in routing.aux_losses.items()]).sum()


def build(cell: Cell, x: Tensor, *, with_peers: bool = True) -> tuple[dict[str, Candidate], dict[str, str]]:
    """All candidates of a cell by name, for the tokens x [T, D]; and why a peer is not among them, by name.

    They share experts where their layouts are the same, and the values of all experts are equal.
    """
    hidden_size, device = x.shape[1], x.device
    # DeepSpeed keeps the accelerator that it finds when it is imported, so not before this.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from dynmoe_ds.engine import seam

    seam.init_distributed(600.0)
    dense = DenseFFN(hidden_size, cell.k * cell.ffn_hidden_size).to(device=device, dtype=x.dtype)
    found = {DENSE: Candidate(run=lambda x: (dense(x), None), module=dense)}
    layers = _our_layers(cell, x)
    for name, layer in layers.items():
        found[name] = Candidate(run=_with_ledger(layer), module=layer, load=measure_load(layer, x))
    if not with_peers:
        return found, {}
    padded = PaddedTopAny(layers[TOP_ANY])
    found[PADDED] = Candidate(run=padded, module=padded, load=found[TOP_ANY].load)

    left_out = {}
    for name, make in _peers(layers[TOP_K], cell):
        try:
            module, run = make()
            module.to(device=device, dtype=x.dtype)
            run(x.detach().requires_grad_())[0].sum().backward()
        except Exception as error:  # whatever a peer cannot do here belongs into the table
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            continue
        found[name] = Candidate(run=run, module=module, load=found[TOP_K].load)
        if name == DROPPING:
            found[name].dropped = dropped_share(layers[TOP_K], x, cell)
    return found, left_out


def check_equal_outputs(cell: Cell, x: Tensor) -> dict[str, float]:
    """How far each peer's output and gradient of x are from ours, by name, as a share of the greatest entry.

    In float32 and for k of 2 or more: with k 1 the peers do not agree among themselves on the weight of the one expert.
    Raises: AssertionError above 1e-4, as then the peers do not compute the same.
    """
    x = x.float()
    found, _ = build(cell, x)
    worst = {}
    for ours, names in ((TOP_K, SAME_AS_TOP_K if cell.k > 1 else ()), (TOP_ANY, (PADDED,))):
        wanted = _output_and_gradient(found[ours], x)
        for name in names:
            if name in found:
                got = _output_and_gradient(found[name], x)
                errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(got, wanted, strict=True)]
                worst[name] = max(error.item() for error in errors)
    assert all(error <= 1e-4 for error in worst.values()), f"{cell.label}: {worst}"
    return worst


def dropped_share(layer: dm.MoELayer, x: Tensor, cell: Cell) -> float:
    """The share of all choices beyond DeepSpeed's default capacity, the mean load."""
    counts = layer.router(x, layer.active, None).mask.sum(0)
    capacity = -(-cell.k * len(x) // cell.num_experts)
    return ((counts - capacity).clamp_min(0).sum() / counts.sum()).item()


def _output_and_gradient(candidate: Candidate, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y, _ = candidate.run(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), gradient


def _our_layers(cell: Cell, x: Tensor) -> dict[str, dm.MoELayer]:
    """Our layers by name. They share one module of experts."""
    shares = wanted_shares(cell.num_experts, cell.k, cell.routing)
    routers: list[tuple[str, str | RouterConfig]] = [("top_k", dm.TopKConfig(k=cell.k))]
    layers: dict[str, dm.MoELayer] = {}
    for name, router in routers + [(name, name) for name in ROUTERS]:
        layer = dm.MoELayer(
            hidden_size=x.shape[1],
            ffn_hidden_size=cell.ffn_hidden_size,
            num_experts=cell.num_experts,
            num_slots=cell.num_experts,
            router=router,
            seed=0,
        )
        if layers:
            layer.experts = layers[TOP_K].experts
        layer.to(device=x.device, dtype=x.dtype)
        set_loads(layer, x, shares)
        layers[f"ours: {name}"] = layer
    return layers


def _with_ledger(layer: dm.MoELayer) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """As in training: auxiliary losses and records are part of it."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        with dm.StepLedger() as ledger:
            y = layer(x)
        return y, ledger.aux_loss()

    return run


_Made = tuple[nn.Module, Callable[[Tensor], tuple[Tensor, Tensor | None]]]


def _peers(layer: dm.MoELayer, cell: Cell) -> Iterator[tuple[str, Callable[[], _Made]]]:
    """How to make each peer with the gate and the experts of our top-k layer; equal layouts share their weights."""
    made: dict[str, Any] = {}

    def deepspeed_moe(drop_tokens: bool) -> _Made:
        module = _deepspeed_moe(layer, cell.k, drop_tokens)
        if "experts" in made:
            module.deepspeed_moe.experts = made["experts"]
        made["experts"] = module.deepspeed_moe.experts

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            y, aux, _ = module(x[None])
            return y[0], AUX_WEIGHT * aux

        return module, run

    def mixtral(implementation: str) -> _Made:
        module = _mixtral(layer, cell.k, implementation)
        if "block" in made:
            module.experts.gate_up_proj = made["block"].experts.gate_up_proj
            module.experts.down_proj = made["block"].experts.down_proj
        made["block"] = module
        return module, lambda x: (module(x[None])[0], None)

    def auto_ep() -> _Made:
        module = _auto_ep(made.get("block") or _mixtral(layer, cell.k, "eager"), layer, cell)
        for name in ("w1", "w2", "w3"):
            setattr(module.experts, name, getattr(layer.experts, name))
        return module, lambda x: (module(x[None])[0], None)

    no_dropping, with_auto_ep, eager, grouped = SAME_AS_TOP_K
    yield DROPPING, lambda: deepspeed_moe(True)
    yield no_dropping, lambda: deepspeed_moe(False)
    yield eager, lambda: mixtral("eager")
    yield grouped, lambda: mixtral("grouped_mm")
    yield with_auto_ep, auto_ep


def _deepspeed_moe(layer: dm.MoELayer, k: int, drop_tokens: bool) -> nn.Module:
    """DeepSpeed's layer, without its noise on the choice of the second expert, so that all choose alike."""
    from deepspeed.moe.layer import MoE

    experts = layer.experts
    moe = MoE(
        layer.hidden_size,
        DenseFFN(layer.hidden_size, layer.ffn_hidden_size),
        num_experts=layer.num_slots,
        k=k,
        drop_tokens=drop_tokens,
        top2_2nd_expert_sampling=False,
    )
    moe.set_deepspeed_parallelism()
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(layer.router.weight)
        for number, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            for name in ("w1", "w2", "w3"):
                getattr(expert, name).weight.copy_(getattr(experts, name)[number])
    return moe


def _mixtral(layer: dm.MoELayer, k: int, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=layer.hidden_size,
        intermediate_size=layer.ffn_hidden_size,
        num_local_experts=layer.num_slots,
        num_experts_per_tok=k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    experts = layer.experts
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat([experts.w1, experts.w3], dim=1))
        block.experts.down_proj.copy_(experts.w2)
    return block


def _auto_ep(block: nn.Module, layer: dm.MoELayer, cell: Cell) -> nn.Module:
    """The layer that DeepSpeed's AutoEP puts in the place of a Mixtral block, for one rank."""
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    spec = MoELayerSpec(
        moe_module_name="mlp", model_family="mixtral", router_name="gate", experts_name="experts",
        expert_storage="fused_3d", expert_w1_name="gate_up_proj", expert_w2_name="down_proj", expert_w3_name=None,
        num_experts=cell.num_experts, top_k=cell.k, hidden_size=layer.hidden_size,
        ffn_hidden_size=layer.ffn_hidden_size, score_func="softmax", score_apply="post", route_norm=True,
        gate_bias=False, return_router_logits=False, router_logits_capture_target="none",
        router_logits_capture_index=None, router_logits_capture_layer_name=None, has_shared_experts=False,
        shared_experts_name="",
    )  # fmt: skip
    return AutoEPMoELayer(spec, block, ep_size=1, ep_rank=0, config=AutoEPConfig())
