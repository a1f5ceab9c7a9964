"""Top-any gating: every expert has a threshold, and a token takes every expert whose score passes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dynmoe_ds.routing import losses
from dynmoe_ds.routing.cosine import cosine_scores
from dynmoe_ds.routing.router import Router, RouterConfig, Routing, register_router


@dataclass(frozen=True, kw_only=True, slots=True)
class TopAnyConfig(RouterConfig):
    """Top-any gating as in the paper; `recommended()` holds the best defaults known, `authors_code()` the later losses.

    temperature: τ in σ(τ s) and in the softmax. weighting: `average` gives every chosen expert 1/k, `softmax` its share
    of exp(τ s) among the chosen ones. straight_through: which margins the gate's gradient reaches, `all_live` (paper)
    or `active_only` (the authors' code). training_fallback: what happens in training to a token without an open
    gate, `none` (its output is zero) or `top_1` (its best live expert, whose forced gate keeps its gradient);
    at evaluation it is always `top_1`. The best expert is the one with the greatest margin. Each auxiliary loss has its
    own full weight, without a common factor; price_weight is per open expert and token, efficiency_weight per share of
    the live experts that are open. load_balance_gradient: what the load-balance loss differentiates, the published
    `gates`, which closes them too, or the `shares` g/k, which only moves load (see `losses.load_balance`).
    Source: arXiv 2405.14297 §3.1 and §3.3; the terms after simplicity come from the authors' later code, price and the
    recommended values from the study summed up in docs/decisions.md.
    """

    temperature: float = 1.0
    weighting: Literal["average", "softmax"] = "average"
    straight_through: Literal["active_only", "all_live"] = "all_live"
    training_fallback: Literal["none", "top_1"] = "none"
    diversity_weight: float = 0.01
    simplicity_weight: float = 0.01
    load_balance_weight: float = 0.0
    load_balance_gradient: Literal["gates", "shares"] = "gates"
    efficiency_weight: float = 0.0
    price_weight: float = 0.0

    @classmethod
    def authors_code(cls) -> TopAnyConfig:
        """The losses and the straight-through gradient of the authors' public code: four terms, 0.01 each."""
        return cls(straight_through="active_only", load_balance_weight=0.01, efficiency_weight=0.01)

    @classmethod
    def recommended(cls) -> TopAnyConfig:
        """The best defaults known: softmax weights, τ = 10, a top-1 floor in training, balance, a price per expert."""
        return cls(
            temperature=10.0,
            weighting="softmax",
            training_fallback="top_1",
            load_balance_weight=0.01,
            load_balance_gradient="shares",
            price_weight=0.01 / 16,
        )

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        found = []
        choices = {
            "weighting": ("average", "softmax"),
            "straight_through": ("active_only", "all_live"),
            "training_fallback": ("none", "top_1"),
            "load_balance_gradient": ("gates", "shares"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                found.append(f"router.{name} is {getattr(self, name)!r}. Use {' or '.join(allowed)}.")
        if not self.temperature > 0:
            found.append(f"router.temperature is {self.temperature} but must be above 0.")
        for name, weight in self.aux_loss_weights().items():
            if not weight >= 0:
                found.append(f"router.{name}_weight is {weight} but must not be negative.")
        return found

    def aux_loss_weights(self) -> dict[str, float]:
        """The weight of every auxiliary loss by name; losses of weight 0 are not computed."""
        return {
            "diversity": self.diversity_weight,
            "simplicity": self.simplicity_weight,
            "load_balance": self.load_balance_weight,
            "efficiency": self.efficiency_weight,
            "price": self.price_weight,
        }


@register_router(
    "top_any",
    TopAnyConfig,
    top_any_recommended=TopAnyConfig.recommended,
    top_any_authors_code=TopAnyConfig.authors_code,
)
class TopAnyRouter(Router):
    """`g_e(x) = [cos(x, w_e) > G_e]` with a straight-through gradient through `σ(τ s_e) − σ(τ G_e)`.

    weight [S, D]: gate rows. threshold [S]: G.

    Which terms carry gradient: the combine weights depend on the gates of the chosen experts only, since the output of
    an expert that did not run is unknown. So a closed gate gets none from the output; with `all_live` it gets some from
    the load-balance, efficiency and price losses, with `active_only` it gets none at all. With `average` the number of
    open gates k is a constant in the backward pass, as in the paper. With `softmax` the weight is g_e exp(τ s_e) / Σ g
    exp(τ s) over the chosen experts, differentiated as a whole: a gate gains by how much its expert is better than the
    token's mixture, not by whether the output should be larger, which would open or close all gates together.
    Diversity and simplicity reach the rows alone.

    Source: arXiv 2405.14297 §3.1. Ours compares scores with thresholds before the sigmoid (equal for τ > 0), where
    small thresholds keep their precision, and works in float32 whatever the model's dtype.
    """

    config: TopAnyConfig

    def __init__(self, config: TopAnyConfig, hidden_size: int, num_slots: int) -> None:
        super().__init__(config, hidden_size, num_slots)
        self.threshold = nn.Parameter(torch.zeros(num_slots))

    def forward(self, hidden: Tensor, active: Tensor, real: Tensor | None) -> Routing:
        """Route `hidden` [T, D] over the live slots `active` [S] bool; `real` [T] bool is False for padding."""
        config = self.config
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight, threshold = hidden.to(dtype), self.weight.to(dtype), self.threshold.to(dtype)
            rows = losses.unit_rows(weight, active)
            scores = cosine_scores(hidden, rows)
            eligible = active.expand_as(scores) if real is None else active & real[:, None]

            chosen = (scores > threshold) & eligible
            margins = torch.sigmoid(config.temperature * scores) - torch.sigmoid(config.temperature * threshold)
            unrouted = ~chosen.any(1) if real is None else ~chosen.any(1) & real
            if not self.training or config.training_fallback == "top_1":
                best = margins.detach().masked_fill(~active, -torch.inf).argmax(1, keepdim=True)
                chosen = chosen | (torch.zeros_like(chosen).scatter(1, best, unrouted[:, None]) & eligible)

            reached = eligible if config.straight_through == "all_live" else chosen
            gates = chosen.to(dtype) + torch.where(reached, margins - margins.detach(), 0.0)
            weights = self._combine_weights(gates, scores, chosen)
            aux = self._aux_losses(gates, weight, rows, active, real)
        return Routing(mask=chosen, weights=weights, aux_losses=aux, unrouted=unrouted)

    def _combine_weights(self, gates: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Weights [T, S], 0 off the chosen experts, that sum to 1 for a token with any."""
        gates = torch.where(chosen, gates, 0.0)
        if self.config.weighting == "average":
            return gates / chosen.sum(1, keepdim=True).clamp_min(1)
        logits = (self.config.temperature * scores).masked_fill(~chosen, -torch.inf)
        # Shifted by the greatest, which cancels out; a token without an expert would shift by -inf and give NaN.
        is_routed = chosen.any(1, keepdim=True)
        shift = logits.detach().amax(1, keepdim=True).where(is_routed, 0.0)
        strength = gates * torch.exp(logits - shift)
        return strength / strength.sum(1, keepdim=True).where(is_routed, 1.0)

    def _aux_losses(
        self, gates: Tensor, weight: Tensor, rows: Tensor, active: Tensor, real: Tensor | None
    ) -> dict[str, Tensor]:
        num_tokens = gates.shape[0] if real is None else real.sum()
        terms: dict[str, Callable[[], Tensor]] = {
            "diversity": lambda: losses.diversity(rows, active),
            "simplicity": lambda: losses.simplicity(weight, active),
            "load_balance": lambda: losses.load_balance(
                gates, active, through_shares=self.config.load_balance_gradient == "shares"
            ),
            "efficiency": lambda: losses.mean_open(gates, num_tokens) / active.sum().clamp_min(1),
            "price": lambda: losses.mean_open(gates, num_tokens),
        }
        return {name: terms[name]() for name, factor in self.config.aux_loss_weights().items() if factor > 0}
