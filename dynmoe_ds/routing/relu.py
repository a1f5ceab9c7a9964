"""ReLU routing: the score itself is the weight, and an expert is closed to a token where its score is not positive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from dynmoe_ds.routing import losses
from dynmoe_ds.routing.budget import Budget, BudgetConfig
from dynmoe_ds.routing.choice import best_expert, eligible_pairs, keep_greatest, without_choice
from dynmoe_ds.routing.logits import gate_logits
from dynmoe_ds.routing.records import RoutingRecords
from dynmoe_ds.routing.router import Router, RouterConfig, Routing, register_router
from dynmoe_ds.routing.splitting import SplitExpert, halving_threshold

LAMBDA_FLOOR = 1e-3
"""Least λ of ReMoE's rule, as a share of `lambda_init`."""

FALLBACK_SHARE = 0.1
"""Weight of the expert that serves a token without an open one at evaluation, as a share of `score_scale`."""

BUDGET_LAMBDA = 2e-3
"""λ under a budget is this times sinh(control)."""

OPENING_FACTOR = 4.0
"""How much stronger the loss that opens experts is than the one that closes them, so that both move k about as fast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReluConfig(RouterConfig):
    """ReLU routing as in ReMoE; `budgeted()` holds the mean number of experts with a PI controller instead of its rule.

    target_k: mean number of experts per token that λ is moved for. score_scale: factor of all scores. Gate rows start
    with length 1, so that scores of normalised tokens start with this standard deviation; 0.28 is that of ReMoE's 182M
    model (gate entries of 0.01, 768 wide) and leaves the weights of 16 experts a sum of 1.8 and a 2-norm of 0.8.
    lambda_init, lambda_factor: λ of the first step, and what it is multiplied or divided by after a step with too many
    or too few experts. load_balanced: whether the L1 loss weighs experts by their load. k_max: most experts per token;
    those with the greatest weights stay. budget: takes the place of target_k, lambda_init and lambda_factor; its gains
    answer to the error as a share of the target. Give it a warm-up, as `budgeted()` does (docs/routers.md).
    Source: arXiv 2412.14711 §3.2 to §3.4 and the authors' public code.
    """

    may_leave_unrouted: ClassVar[bool] = True

    target_k: float = 2.0
    score_scale: float = 0.28
    lambda_init: float = 1e-8
    lambda_factor: float = 1.2
    load_balanced: bool = True
    k_max: int | None = None
    budget: BudgetConfig | None = None

    @classmethod
    def budgeted(cls, target_k: float = 2.0) -> ReluConfig:
        """`target_k` experts per token by a budget that comes down from half of the experts in 100 steps.

        ReMoE's own rule takes about as long, in which training is dense.
        """
        return cls(target_k=target_k, budget=BudgetConfig(target_k=target_k, warmup_steps=100))

    @property
    def wanted_k(self) -> float:
        """The mean number of experts per token to reach, of the budget if there is one."""
        return self.target_k if self.budget is None else self.budget.target_k

    @property
    def most_experts(self) -> int | None:
        """`k_max`."""
        return self.k_max

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        found = []
        for name in ("target_k", "score_scale", "lambda_init"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                found.append(f"router.{name} is {value} but must be a finite number above 0.")
        if not 1 < self.lambda_factor < math.inf:
            found.append(f"router.lambda_factor is {self.lambda_factor} but must be a finite number above 1.")
        if self.k_max is not None and self.k_max < 1:
            found.append(f"router.k_max is {self.k_max} but must be at least 1.")
        if self.budget is not None:
            return found + self._set_beside_a_budget() + self.budget.faults(self.k_max)
        if self.k_max is not None and self.target_k > self.k_max:
            found.append(
                f"router.target_k is {self.target_k} but no token may take more than router.k_max ({self.k_max}). "
                "Lower the one or raise the other."
            )
        return found

    def aux_loss_weights(self) -> dict[str, float]:
        """The weights before the first step; the router's controller moves them."""
        return {"l1": self.lambda_init} if self.budget is None else {"l1": 0.0, "opening": 0.0}

    def _set_beside_a_budget(self) -> list[str]:
        """Settings that differ from their defaults although the budget takes their place."""
        assert self.budget is not None
        found = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("target_k", "lambda_init", "lambda_factor") or value == field.default:
                continue
            if (field.name, value) != ("target_k", self.budget.target_k):
                found.append(
                    f"router.{field.name} is {value} but router.budget takes its place. Leave one of the two out."
                )
        return found


class SparsityBudget(Budget):
    """A budget for what answers slowly: `control = kp e + ki Σ e` with `e = (mean k − target) / target`, within bounds.

    kp e stays within ±2.5, and what a step adds to ki Σ e within ±0.12: far from the target a greater error must not
    let the sum run ahead of what it has set in motion.
    """

    @torch.no_grad()
    def update(self, mean_k: Tensor, num_live: Tensor) -> None:
        """Take in one optimiser step: its mean k and the (mean) number of live experts, float64 scalars."""
        target = self.target(num_live)
        error = (mean_k - target) / target
        step, bound = 0.12 / self.integral_gain, self.limit / self.integral_gain
        self.error_sum.add_(error.clamp(-step, step)).clamp_(-bound, bound)
        proportional = (self.proportional_gain * error).clamp(-2.5, 2.5)
        self.control.copy_(proportional + self.integral_gain * self.error_sum)
        self.num_updates.add_(1)


@register_router("relu", ReluConfig, relu_budget=ReluConfig.budgeted)
class ReluRouter(Router):
    """`R_e(x) = ReLU(c w_e · x)` with c = score_scale: weight of expert e, which is open to x if it is above 0.

    weight [S, D]: gate rows. l1_coefficient: λ as a float64 scalar, without a budget.

    l1: `(1/T) Σ_t Σ_e f_e R_e(x_t)` over real tokens and live experts, with f_e = 1 or, load-balanced, the constant
    `K / (k T) Σ_t [R_e(x_t) > 0]`, k being the target: an expert of twice the mean load at the target counts twice.
    Over the tokens of this rank and micro step. Its weight λ is multiplied by `lambda_factor` after an optimiser step
    whose mean k was above the target, and divided by it after one below.

    With a budget `λ = 0.002 sinh(control)`: far from 0 the controller moves log λ. As the L1 loss can only close
    experts, a negative λ is the weight of the loss `opening` instead, `4 k / (K − k) (1/T) Σ_t Σ_e ReLU(−c w_e · x_t)`:
    with closed scores as great as open ones, four times an L1 loss. It also reaches experts that are closed to
    everybody, which otherwise have no gradient.

    A token without an open expert gets zeros in training. At evaluation the expert of its greatest score serves it,
    with the weight 0.1 · score_scale: the model has learned zeros there, and greater weights made it worse
    (docs/routers.md).

    Source: arXiv 2412.14711. There λ is one for all layers and the mean k is that over layers; here every layer has its
    own, unless a budget has the scope `model`. Ours never lets λ fall below a thousandth of `lambda_init`: it has no
    effect there and would only take longer to come back.
    """

    config: ReluConfig
    l1_coefficient: Tensor

    def __init__(self, config: ReluConfig, hidden_size: int, num_slots: int) -> None:
        super().__init__(config, hidden_size, num_slots)
        if config.budget is None:
            self.register_buffer("l1_coefficient", torch.tensor(config.lambda_init, dtype=torch.float64))
        else:
            self.budget = SparsityBudget(
                config.budget, proportional_gain=12.0, integral_gain=1.2, limit=6.0, k_max=config.k_max
            )

    @property
    def has_controller(self) -> bool:
        """Whether `update_routers` must be called after every optimiser step: always."""
        return True

    def forward(self, hidden: Tensor, active: Tensor, real: Tensor | None) -> Routing:
        """Route `hidden` [T, D] over the live slots `active` [S] bool; `real` [T] bool is False for padding."""
        config = self.config
        with torch.autocast(hidden.device.type, enabled=False):
            scores = config.score_scale * gate_logits(hidden, self.weight)
            eligible = eligible_pairs(active, real, len(hidden))
            is_open = (scores > 0) & eligible
            aux = self._aux_losses(scores, is_open, eligible, active, real)

            unrouted = without_choice(is_open, real)
            chosen = keep_greatest(is_open, scores, config.k_max)
            weights = torch.where(chosen, scores, 0.0)
            if not self.training:
                forced = best_expert(unrouted, scores, active)
                weights = torch.where(forced, FALLBACK_SHARE * config.score_scale, weights)
                chosen = chosen | forced
        return Routing(mask=chosen, weights=weights, aux_losses=aux, unrouted=unrouted)

    def aux_loss_weights(self) -> Mapping[str, float | Tensor]:
        """λ for `l1`; under a budget also −λ for `opening`. Whichever would be negative is 0."""
        value = self._lambda().float()
        return {"l1": value} if self.budget is None else {"l1": value.clamp_min(0), "opening": (-value).clamp_min(0)}

    def observables(self, active: Tensor) -> dict[str, Tensor]:
        """Those of the budget, and λ; `active` [S] bool are the live slots."""
        return super().observables(active) | {"lambda": self._lambda()}

    @torch.no_grad()
    def update(self, records: RoutingRecords, active: Tensor) -> None:
        """Take in one optimiser step: move λ by ReMoE's rule, unless a budget does it."""
        if self.budget is None:
            excess = torch.sign(records.num_assignments.double() / records.num_tokens - self.config.target_k)
            self.l1_coefficient.mul_(self.config.lambda_factor**excess).clamp_min_(
                LAMBDA_FLOOR * self.config.lambda_init
            )

    def split(self, values: Mapping[str, Tensor], split: SplitExpert) -> dict[str, Tensor]:
        """Gate rows with which each half takes half of the parent's tokens and both together weigh as much as it did.

        values: parameters [S, ...] of the slots by name; `weight` has the halves' rows, which between them are open to
        more tokens than the parent was. Without a sample of tokens they get half the length.
        """
        weight, halves = values["weight"].clone(), [split.parent, split.child]
        load = int(split.chose_parent.sum())
        if load < 2:
            weight[halves] /= 2
            return {"weight": weight}
        tokens, rows = split.hidden.double(), weight[halves].double()
        row = rows.mean(0) * torch.linalg.vector_norm(rows[0]) / torch.linalg.vector_norm(rows.mean(0))
        # Less θ times the mean direction of the parent's tokens, a half is open where score / (x · axis) is above θ.
        mean = tokens[split.chose_parent].mean(0)
        axis = mean / (mean @ mean)
        along = (tokens @ axis)[:, None]
        ratios = (tokens @ rows.T / along).masked_fill(along <= 0, -torch.inf)
        shifted = rows - torch.stack([halving_threshold(column, load) for column in ratios.T])[:, None] * axis
        # Of tokens that point everywhere alike every row is open to half, and no direction makes it less.
        if 0 < (tokens @ shifted.T > 0).sum() < (tokens @ rows.T > 0).sum():
            rows = shifted
        together = torch.relu(tokens @ rows.T).sum()
        if together > 0:
            rows = rows * (torch.relu(tokens @ row).sum() / together)
        weight[halves] = rows.to(weight)
        return {"weight": weight}

    def _lambda(self) -> Tensor:
        """λ, a float64 scalar."""
        return self.l1_coefficient if self.budget is None else BUDGET_LAMBDA * torch.sinh(self.budget.control)

    def _aux_losses(
        self, scores: Tensor, is_open: Tensor, eligible: Tensor, active: Tensor, real: Tensor | None
    ) -> dict[str, Tensor]:
        target, num_live = self.config.wanted_k, active.sum().to(scores.dtype)
        num_tokens = losses.num_real_tokens(scores, real).clamp_min(1)
        strengths = torch.where(is_open, scores, 0.0).sum(0) / num_tokens
        if self.config.load_balanced:
            strengths = strengths * (is_open.sum(0).to(scores.dtype) / num_tokens * num_live / target)
        found = {"l1": strengths.sum()}
        if self.budget is not None:
            depths = torch.where(eligible & ~is_open, -scores, 0.0).sum() / num_tokens
            found["opening"] = OPENING_FACTOR * target / (num_live - target).clamp_min(1) * depths
        return found
