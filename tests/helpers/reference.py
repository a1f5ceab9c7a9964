"""The layer a second time: the paper's formulas as a loop over tokens and experts, without any code of the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from dynmoe_ds.moe import MoELayer
from dynmoe_ds.routing import TopAnyConfig

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative to the greatest element of what is expected (at least 1), for values and gradients alike."""

LOSSES = ("diversity", "simplicity", "load_balance", "efficiency", "price")


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype | None = None, what: str = "") -> None:
    """Fails if `got` is further from `expected` than the tolerance of `dtype` (that of `got` if None)."""
    assert got.shape == expected.shape, (what, got.shape, expected.shape)
    if not got.numel():
        return
    scale = max(expected.abs().max().item(), 1.0)
    error = (got.double() - expected.double()).abs().max().item()
    limit = TOLERANCES[dtype or got.dtype] * scale
    assert error <= limit, f"{what} is off by {error}, more than {limit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a layer must give for T tokens. mask [T, S] bool; gradients by the names of parameters, and of `x`."""

    y: Tensor
    mask: Tensor
    aux_losses: dict[str, Tensor]
    aux_loss: Tensor
    num_unrouted: int
    unrouted_sum: Tensor
    gradients: dict[str, Tensor]


def randomise(layer: MoELayer, seed: int = 0) -> MoELayer:
    """Random rows and thresholds near 0 in all slots, poison in free ones: open thresholds, experts of NaN.

    The values depend on the seed and the slot, not on the layout.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in layer.named_parameters():
            full = torch.randn(layer.num_slots, *param.shape[1:], generator=generator, dtype=torch.float64)
            if name == "router.threshold":
                full = torch.where(layer.active, 0.2 * full, -2.0)
            if name.startswith("experts."):
                full = full / full[0].numel() ** 0.25
                full[~layer.active] = torch.nan
                full = full[layer.local_slots.start : layer.local_slots.stop]
            param.copy_(full)
    return layer


def parameters(layer: MoELayer) -> dict[str, Tensor]:
    """Copies of the parameters in float64, as leaves."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in layer.named_parameters()}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}
ACTIVATION_OF = {
    "swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh",
    "gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
}  # fmt: skip
"""The activation of every kind of expert."""


def expert(p: Mapping[str, Tensor], slot: int, h: Tensor, kind: str | None = None) -> Tensor:
    """One expert [D] of one token h [D]; of kind None SwiGLU where there is a w3, else GELU."""
    w1, w2 = p["experts.w1"][slot], p["experts.w2"][slot]
    is_gated = "experts.w3" in p
    activation = ACTIVATIONS[ACTIVATION_OF[kind or ("swiglu" if is_gated else "gelu")]]
    if is_gated:
        return w2 @ (activation(w1 @ h) * (p["experts.w3"][slot] @ h))
    return w2 @ activation(w1 @ h + p["experts.b1"][slot]) + p["experts.b2"][slot]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two vectors; 0, without a gradient, where one of them is zero."""
    lengths = a.square().sum().sqrt(), b.square().sum().sqrt()
    return a @ b / (lengths[0] * lengths[1]) if all(lengths) else torch.zeros((), dtype=a.dtype)


def expected(
    x: Tensor,
    p: dict[str, Tensor],
    live: list[int],
    config: TopAnyConfig,
    *,
    training: bool = True,
    real: Tensor | None = None,
    loss_weight: Tensor,
    control: float = 0.0,
    bias: Tensor | None = None,
) -> Expected:
    """The layer's result for x [T, D], and the gradients of `(y * loss_weight).sum()` plus, in training, the losses.

    A gate is `hard + soft − constant(soft)` with `soft = σ(τ s) − σ(τ G)` where the straight-through gradient reaches.
    control: of the budget. bias [S]: of loss-free balancing.
    """
    x = x.detach().double().requires_grad_()
    num_tokens, num_slots, tau = len(x), len(p["router.threshold"]), config.temperature
    is_real = [True] * num_tokens if real is None else real.tolist()
    rows, thresholds = p["router.weight"], _thresholds(p["router.threshold"], live, config, x.shape[1], control, bias)

    mask = torch.zeros(num_tokens, num_slots, dtype=torch.bool)
    gates: list[dict[int, Tensor]] = []  # per real token: gate by live slot
    outputs, unrouted = [], []
    for t, h in enumerate(x):
        y = torch.zeros_like(h)
        if is_real[t]:
            score = _scores(h, rows, live, config)
            soft = {e: torch.sigmoid(tau * score[e]) - torch.sigmoid(tau * thresholds[e]) for e in live}
            chosen = sorted((e for e in live if score[e] > thresholds[e]), key=lambda e: -soft[e].item())
            chosen = chosen[: config.k_max]
            if not chosen:
                unrouted.append(h.detach())
                if not training or config.training_fallback == "top_1":
                    merits = soft if config.fallback_by == "margin" else score
                    chosen = [max(live, key=lambda e: merits[e].item())]
            gate = {}
            for e in live:
                gate[e] = torch.tensor(float(e in chosen), dtype=torch.float64)
                if config.straight_through == "all_live" or e in chosen:
                    gate[e] = gate[e] + soft[e] - soft[e].detach()
            for e in chosen:
                weight = gate[e] / len(chosen)
                if config.weighting == "softmax":
                    weight = gate[e] * torch.exp(tau * score[e])
                    weight = weight / sum(gate[c] * torch.exp(tau * score[c]) for c in chosen)
                y = y + weight * expert(p, e, h)
                mask[t, e] = True
            gates.append(gate)
        outputs.append(y)

    by_name = dict(_LOSSES)
    if config.load_balance_gradient == "shares":
        by_name["load_balance"] = _load_balance_through_shares
    losses = {name: loss(gates, rows, live) for name, loss in by_name.items() if getattr(config, f"{name}_weight") > 0}
    aux_loss = sum((getattr(config, f"{name}_weight") * value for name, value in losses.items()), torch.zeros(()))
    y = torch.stack(outputs) if outputs else torch.zeros_like(x)
    total = (y * loss_weight).sum() + (aux_loss if training else 0.0)
    leaves = {"x": x, **p}
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return Expected(
        y=y.detach(),
        mask=mask,
        aux_losses=losses,
        aux_loss=aux_loss,
        num_unrouted=len(unrouted),
        unrouted_sum=sum(unrouted, torch.zeros(x.shape[1], dtype=torch.float64)),
        gradients={
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        },
    )


def _scores(h: Tensor, rows: Tensor, live: list[int], config: TopAnyConfig) -> dict[int, Tensor]:
    """What is compared with the thresholds, by live slot."""
    if config.score == "cosine":
        return {e: cosine(h, rows[e]) for e in live}
    logits = {e: (h * rows[e]).sum() for e in live}
    total = sum(torch.exp(logit) for logit in logits.values())
    return {e: torch.log(len(live) * torch.exp(logits[e]) / total) for e in live}


def _thresholds(
    thresholds: Tensor, live: list[int], config: TopAnyConfig, hidden_size: int, control: float, bias: Tensor | None
) -> dict[int, Tensor]:
    """What scores are compared with, by live slot."""
    found = {e: thresholds[e] for e in live}
    if bias is not None:
        found = {e: found[e] - bias[e] + sum(bias[i] for i in live) / len(live) for e in live}
    if config.budget is not None:
        share = min(config.budget.target_k, len(live), config.k_max or len(live)) / len(live)
        z = -NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6))
        start = z / (hidden_size - 1 + z * z) ** 0.5 if config.score == "cosine" else z - 0.5
        offset = start + control
        mean = sum(found.values()) / len(live)
        found = {e: found[e] - mean + offset for e in live}
    return found


def _diversity(gates: list[dict[int, Tensor]], rows: Tensor, live: list[int]) -> Tensor:
    return sum((cosine(rows[i], rows[j]) - float(i == j)) ** 2 for i in live for j in live).sqrt()


def _simplicity(gates: list[dict[int, Tensor]], rows: Tensor, live: list[int]) -> Tensor:
    return sum((rows[e].square().sum().sqrt() for e in live if rows[e].any()), torch.zeros(())) / len(live)


def _load_balance(gates: list[dict[int, Tensor]], rows: Tensor, live: list[int]) -> Tensor:
    routed = [gate for gate in gates if any(bool(g > 0.5) for g in gate.values())]
    if not routed:
        return torch.zeros(())
    k = [sum(round(g.item()) for g in gate.values()) for gate in routed]
    me = {e: sum(gate[e] / k_t for gate, k_t in zip(routed, k, strict=True)) / len(routed) for e in live}
    ce = {e: sum(gate[e] for gate in routed) / len(routed) for e in live}
    return len(live) ** 2 * sum(me[e] * ce[e] for e in live) / len(live)


def _load_balance_through_shares(gates: list[dict[int, Tensor]], rows: Tensor, live: list[int]) -> Tensor:
    routed = [gate for gate in gates if any(bool(g > 0.5) for g in gate.values())]
    if not routed:
        return torch.zeros(())
    me = {e: sum(gate[e] / sum(gate.values()) for gate in routed) / len(routed) for e in live}
    ce = {e: sum(gate[e].detach() for gate in routed) / len(routed) for e in live}
    return len(live) ** 2 * sum(me[e] * ce[e] for e in live) / len(live)


def _price(gates: list[dict[int, Tensor]], rows: Tensor, live: list[int]) -> Tensor:
    return sum((g for gate in gates for g in gate.values()), torch.zeros(())) / max(len(gates), 1)


def _efficiency(gates: list[dict[int, Tensor]], rows: Tensor, live: list[int]) -> Tensor:
    return _price(gates, rows, live) / len(live)


_LOSSES = {
    "diversity": _diversity,
    "simplicity": _simplicity,
    "load_balance": _load_balance,
    "efficiency": _efficiency,
    "price": _price,
}
