"""Budgets: a target for the mean number of experts per token, held by a PI controller."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor

from dynmoe_ds.routing.exact_buffers import ExactBuffers

SCOPES: tuple[str, ...] = ("layer", "model")


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """A target for mean k, the number of experts per real token, experts of a fallback included.

    target_k: mean k to hold; with fewer live experts than that, all of them. scope: `layer` holds it in every layer,
    `model` holds the mean over all layers with an equal BudgetConfig and lets layers differ, with one control value for
    all. warmup_steps: optimiser steps in which the target moves linearly from `warmup_k` to `target_k`; warmup_k None
    starts at half of the live experts. proportional_gain, integral_gain: answer of the control value to the error
    (mean k − target) / K and to its sum over steps, in units of what the router controls; None takes the router's own.
    Source of the model-wide form: DTop-p, arXiv 2512.13996.
    """

    target_k: float
    scope: Literal["layer", "model"] = "layer"
    warmup_steps: int = 0
    warmup_k: float | None = None
    proportional_gain: float | None = None
    integral_gain: float | None = None

    def faults(self, k_max: int | None = None, k_min: int = 0) -> list[str]:
        """One sentence per value that cannot work.

        k_max: the router's hard bound per token. k_min: experts that every token gets, which the router takes away from
        no token, whatever the budget.
        """
        found = []
        for name in ("target_k", "warmup_k"):
            k = getattr(self, name)
            if k is not None and not k_min < k < inf:
                found.append(f"router.budget.{name} is {k} but must be a finite number above {k_min}.")
            if k is not None and k_max is not None and k > k_max:
                found.append(
                    f"router.budget.{name} is {k} but no token may take more than router.k_max ({k_max}). "
                    "Lower the one or raise the other."
                )
        if self.scope not in SCOPES:
            found.append(f"router.budget.scope is {self.scope!r}. Use {' or '.join(SCOPES)}.")
        if self.warmup_steps < 0:
            found.append(f"router.budget.warmup_steps is {self.warmup_steps} but must not be negative.")
        if self.warmup_k is not None and self.warmup_steps == 0:
            found.append(
                f"router.budget.warmup_k is {self.warmup_k} but router.budget.warmup_steps is 0. "
                "Set warmup_steps, or leave warmup_k out."
            )
        for name in ("proportional_gain", "integral_gain"):
            gain = getattr(self, name)
            if gain is not None and not 0 <= gain < inf:
                found.append(f"router.budget.{name} is {gain} but must be a finite number that is not negative.")
        if self.integral_gain == 0:
            found.append("router.budget.integral_gain is 0, which leaves a constant error. Use a value above 0.")
        return found


class Budget(ExactBuffers):
    """`control = kp e + ki Σ e` with `e = (mean k − target) / K`: positive when tokens take too many experts.

    control, error_sum: float64 scalars. num_updates: int64 scalar. All are in the state dict.
    limit: greatest size of `control` that can have an effect; the sum stops growing there, or it would take as long to
    come back. k_max: the router's hard bound per token. Source of the form: DTop-p, arXiv 2512.13996, equation for p
    with the sign turned.
    """

    control: Tensor
    error_sum: Tensor
    num_updates: Tensor

    def __init__(
        self,
        config: BudgetConfig,
        *,
        proportional_gain: float,
        integral_gain: float,
        limit: float = inf,
        k_max: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.proportional_gain = proportional_gain if config.proportional_gain is None else config.proportional_gain
        self.integral_gain = integral_gain if config.integral_gain is None else config.integral_gain
        self.limit = limit
        self.k_max = k_max
        self.register_buffer("control", torch.zeros((), dtype=torch.float64))
        self.register_buffer("error_sum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def target(self, num_live: Tensor) -> Tensor:
        """The mean k, a float64 scalar, that the next optimiser step is held against; `num_live` is K, a scalar.

        Never more than a token can take: what cannot be reached would only fill the sum of errors.
        """
        config, num_live = self.config, num_live.double()
        target = torch.full_like(num_live, config.target_k)
        if config.warmup_steps > 0:
            start = num_live / 2 if config.warmup_k is None else config.warmup_k
            target = start + (target - start) * (self.num_updates.double() / config.warmup_steps).clamp(max=1.0)
        return torch.minimum(target, num_live if self.k_max is None else num_live.clamp(max=self.k_max))

    @torch.no_grad()
    def update(self, mean_k: Tensor, num_live: Tensor) -> None:
        """Take in one optimiser step: its mean k and the (mean) number of live experts, float64 scalars."""
        error = (mean_k - self.target(num_live)) / num_live
        bound = self.limit / self.integral_gain
        self.error_sum.add_(error).clamp_(-bound, bound)
        self.control.copy_(self.proportional_gain * error + self.integral_gain * self.error_sum)
        self.num_updates.add_(1)
