"""Top-k routing: every token takes its k most probable experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe_ds.routing import losses
from dynmoe_ds.routing.router import register_router
from dynmoe_ds.routing.softmax import SoftmaxConfig, SoftmaxRouter, SoftmaxScores


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKConfig(SoftmaxConfig):
    """Top-k routing, the baseline with a fixed number of experts per token.

    k: choices per token, null experts included; with fewer live and null experts than that, all of them. renormalize:
    as for every softmax router, but without effect for k = 1: the one weight would be the constant 1 and the router
    would learn nothing from the output, so it stays the probability. z_loss_weight: of the squared logarithm of the
    softmax's denominator, which keeps logits small. The others: see `SoftmaxConfig`.
    Source: GShard (arXiv 2006.16668), Switch Transformer (arXiv 2101.03961), z-loss of ST-MoE (arXiv 2202.08906).
    """

    k: int = 2
    renormalize: bool = True
    z_loss_weight: float = 0.0

    @property
    def most_experts(self) -> int:
        """All k choices, where no null expert is among them."""
        return self.k

    @property
    def min_experts(self) -> int:
        """Live experts that k choices need; pruning leaves at least as many."""
        return max(self.k - self.num_null_experts, 1)

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        found = [] if self.k >= 1 else [f"router.k is {self.k} but must be at least 1."]
        return found + SoftmaxConfig.faults(self)

    def aux_loss_weights(self) -> dict[str, float]:
        """The weight of every auxiliary loss by name; losses of weight 0 are not computed."""
        return {"load_balance": self.load_balance_weight, "z_loss": self.z_loss_weight}


@register_router("top_k", TopKConfig)
class TopKRouter(SoftmaxRouter):
    """The k greatest of `P = softmax(W x)`, weighted by P over their sum (by P itself for k = 1).

    load_balance: `M Σ_i f_i Q_i` over the M live and null experts, f_i the share of all choices that fall on i and Q_i
    the mean of P_i over tokens. It is 1 for even loads whatever k is, and Switch's loss for k = 1. z_loss: mean over
    tokens of `(log Σ_i exp(w_i · x))²`.
    """

    config: TopKConfig

    def _choose(self, scores: Tensor, probs: Tensor) -> Tensor:
        best = scores.topk(min(self.config.k, scores.shape[1]), dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)

    def _renormalizes(self) -> bool:
        return self.config.renormalize and self.config.k > 1

    def _loss_terms(
        self, scores: SoftmaxScores, chosen: Tensor, real: Tensor | None
    ) -> dict[str, Callable[[], Tensor]]:
        return {
            "load_balance": lambda: self._load_balance(scores, chosen, real, total=chosen.sum()),
            "z_loss": lambda: losses.z_loss(scores.logits, real),
        }
