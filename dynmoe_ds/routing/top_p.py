"""Top-p routing: every token takes experts, the most probable first, until their probabilities sum to p."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe_ds.routing import losses
from dynmoe_ds.routing.budget import Budget, BudgetConfig
from dynmoe_ds.routing.router import register_router
from dynmoe_ds.routing.softmax import SoftmaxConfig, SoftmaxRouter, SoftmaxScores


@dataclass(frozen=True, kw_only=True, slots=True)
class TopPConfig(SoftmaxConfig):
    """Dynamic top-p routing as in the paper; `budgeted()` holds the mean number of experts instead of p.

    p: probability that a token's experts must hold together, (0, 1]; with a budget, its value before the first step,
    below 1. entropy_weight: β, of the mean entropy of P; without it P flattens and k grows. k_max: most experts per
    token; the first stay. budget: mean number of experts per token to hold, by p. The others: see `SoftmaxConfig`.
    Source: arXiv 2403.07652; the budget is that of DTop-p (arXiv 2512.13996).
    """

    p: float = 0.4
    renormalize: bool = False
    entropy_weight: float = 1e-4
    k_max: int | None = None
    budget: BudgetConfig | None = None

    @classmethod
    def budgeted(cls, target_k: float = 2.0) -> TopPConfig:
        """The paper's losses with `target_k` experts per token on average, whatever p that takes."""
        return cls(budget=BudgetConfig(target_k=target_k))

    @property
    def most_experts(self) -> int | None:
        """`k_max`."""
        return self.k_max

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        found = []
        if not 0 < self.p <= 1:
            found.append(f"router.p is {self.p} but must be above 0 and at most 1.")
        elif self.p == 1 and self.budget is not None:
            found.append("router.p is 1 but a budget must start from a p below 1. Use 0.4, or leave it out.")
        if self.k_max is not None and self.k_max < 1:
            found.append(f"router.k_max is {self.k_max} but must be at least 1.")
        if self.budget is not None:
            found += self.budget.faults(self.k_max, k_min=0 if self.num_null_experts > 0 else 1)
        return found + SoftmaxConfig.faults(self)

    def aux_loss_weights(self) -> dict[str, float]:
        """The weight of every auxiliary loss by name; losses of weight 0 are not computed."""
        return {"load_balance": self.load_balance_weight, "entropy": self.entropy_weight}


@register_router("top_p", TopPConfig, top_p_budget=TopPConfig.budgeted)
class TopPRouter(SoftmaxRouter):
    """The smallest set of experts, taken in the order of `P = softmax(W x)`, that holds at least p; weighted by P.

    load_balance: `M Σ_i f_i Q_i` over the M live and null experts, f_i the share of tokens that chose i and Q_i the
    mean of P_i over tokens. entropy: mean over tokens of `−Σ_i P_i log P_i`. A balancing bias changes the order in
    which experts are taken; what they hold is P still.

    With a budget `logit p_t = logit p − control`. DTop-p moves p itself, but how much mean k answers to p changes a
    thousandfold between a flat and a peaked softmax, where p must come close to 1. To the logit of p it changes
    tenfold, so that one pair of gains is stable for both (docs/routers.md).
    """

    config: TopPConfig

    def __init__(self, config: TopPConfig, hidden_size: int, num_slots: int) -> None:
        super().__init__(config, hidden_size, num_slots)
        if config.budget is not None:
            # At a logit of ±16 the rest of the probability is 1e-7, which a float32 sum no longer sees.
            self.budget = Budget(
                config.budget, proportional_gain=1.0, integral_gain=1.0, limit=16.0, k_max=config.k_max
            )

    def observables(self, active: Tensor) -> dict[str, Tensor]:
        """Those of the budget, and the p that it has come to; `active` [S] bool are the live slots."""
        p = self._p()
        return super().observables(active) | ({"p": p} if isinstance(p, Tensor) else {})

    def _choose(self, scores: Tensor, probs: Tensor) -> Tensor:
        order = scores.argsort(dim=1, descending=True, stable=True)
        held_before = F.pad(probs.gather(1, order).cumsum(1)[:, :-1], (1, 0))
        taken = held_before < self._p()
        if self.config.k_max is not None:
            is_expert = order < self.weight.shape[0]
            taken &= ~is_expert | (is_expert.cumsum(1) <= self.config.k_max)
        return torch.zeros_like(taken).scatter(1, order, taken)

    def _p(self) -> Tensor | float:
        if self.budget is None:
            return self.config.p
        return torch.sigmoid(math.log(self.config.p / (1 - self.config.p)) - self.budget.control)

    def _loss_terms(
        self, scores: SoftmaxScores, chosen: Tensor, real: Tensor | None
    ) -> dict[str, Callable[[], Tensor]]:
        num_tokens = losses.num_real_tokens(chosen, real)
        return {
            "load_balance": lambda: self._load_balance(scores, chosen, real, total=num_tokens),
            "entropy": lambda: losses.entropy(scores.probs, scores.log_probs(), real),
        }
