"""Expert-threshold routing: every expert takes the same share of all tokens, those that score highest with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dynmoe_ds.routing.choice import best_expert, eligible_pairs, keep_greatest, without_choice
from dynmoe_ds.routing.cosine import cosine_quantile
from dynmoe_ds.routing.logits import gate_logits
from dynmoe_ds.routing.records import RoutingRecords
from dynmoe_ds.routing.router import Router, RouterConfig, Routing, register_router
from dynmoe_ds.routing.score_histogram import NUM_BINS, kth_greatest, score_histogram
from dynmoe_ds.routing.splitting import SplitExpert, halving_threshold


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertThresholdConfig(RouterConfig):
    """Expert-threshold routing as in the paper; `recommended()` follows faster and serves every token in training.

    target_k: mean number of experts per token; every expert takes the share target_k / K of the tokens. decay: of the
    moving average of a threshold, per optimiser step. training_fallback: what happens in training to a token that no
    expert takes, `none` (its output is zero) or `top_1` (the expert whose threshold it misses least); at evaluation it
    is always `top_1`. k_max: most experts per token; those whose thresholds it passes by most stay.
    Source: arXiv 2603.11535 and the authors' public code.
    """

    may_leave_unrouted: ClassVar[bool] = True
    has_equal_loads: ClassVar[bool] = True

    target_k: float = 2.0
    decay: float = 0.99
    training_fallback: Literal["none", "top_1"] = "none"
    k_max: int | None = None

    @classmethod
    def recommended(cls) -> ExpertThresholdConfig:
        """For runs of thousands of steps or fewer: thresholds that lag by about 10 steps, a top-1 floor in training."""
        return cls(decay=0.9, training_fallback="top_1")

    @property
    def most_experts(self) -> int | None:
        """`k_max`."""
        return self.k_max

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        found = []
        least = 1 if self.training_fallback == "top_1" else 0
        if not least < self.target_k < math.inf:
            found.append(f"router.target_k is {self.target_k} but must be a finite number above {least}.")
        if not 0 <= self.decay < 1:
            found.append(f"router.decay is {self.decay} but must be at least 0 and below 1.")
        if self.training_fallback not in ("none", "top_1"):
            found.append(f"router.training_fallback is {self.training_fallback!r}. Use none or top_1.")
        if self.k_max is not None and self.k_max < 1:
            found.append(f"router.k_max is {self.k_max} but must be at least 1.")
        elif self.k_max is not None and self.target_k > self.k_max:
            found.append(
                f"router.target_k is {self.target_k} but no token may take more than router.k_max ({self.k_max}). "
                "Lower the one or raise the other."
            )
        return found

    def aux_loss_weights(self) -> dict[str, float]:
        """None: equal loads need no loss."""
        return {}


@register_router(
    "expert_threshold", ExpertThresholdConfig, expert_threshold_recommended=ExpertThresholdConfig.recommended
)
class ExpertThresholdRouter(Router):
    """A token takes every expert e whose score `r_e = w_e · x` is above the threshold c_e, with weight `σ(r_e)`.

    weight [S, D]: gate rows. threshold [S] float64: c. num_updates, num_live: int64 scalars. added_k: float64 scalar.

    After every optimiser step c_e moves towards the score that the share target_k / K of the step's tokens passed with
    e, over all micro steps and ranks, as a moving average of the given decay with the start-up correction of Adam: the
    first step's scores set it whole, the n-th count (1 − decay) / (1 − decay ** n). Scores come as histograms, exact to
    a bin's width (`score_histogram.py`). Where a fallback adds experts or `k_max` takes some away, the share aims at
    target_k less `added_k`, the moving average of what they add per token. When experts come or go, so that K and with
    it the share of each changes, both averages start anew.

    Before the first step the thresholds are those that would let the share through if tokens pointed everywhere alike:
    cosines of `cosine_quantile`, whatever the tokens' length. Gradients flow through the weights alone, to the rows of
    chosen experts.

    Source: arXiv 2603.11535. There ranks and micro steps average the k-th greatest scores of their own tokens; here it
    is that of all tokens together. There the first steps are trained with expert choice, which looks at later tokens;
    ours starts from the thresholds above. Capacity bounds, a shared expert and a dense first layer are the model's.
    """

    config: ExpertThresholdConfig
    threshold: Tensor
    added_k: Tensor
    num_updates: Tensor
    num_live: Tensor
    slot_buffers = ("threshold",)

    def __init__(self, config: ExpertThresholdConfig, hidden_size: int, num_slots: int) -> None:
        super().__init__(config, hidden_size, num_slots)
        self.register_buffer("threshold", torch.zeros(num_slots, dtype=torch.float64))
        self.register_buffer("added_k", torch.zeros((), dtype=torch.float64))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_live", torch.zeros((), dtype=torch.int64))

    @property
    def has_controller(self) -> bool:
        """Whether `update_routers` must be called after every optimiser step: always."""
        return True

    def forward(self, hidden: Tensor, active: Tensor, real: Tensor | None) -> Routing:
        """Route `hidden` [T, D] over the live slots `active` [S] bool; `real` [T] bool is False for padding."""
        config = self.config
        with torch.autocast(hidden.device.type, enabled=False):
            scores = gate_logits(hidden, self.weight)
            eligible = eligible_pairs(active, real, len(hidden))
            margins = scores.detach() - self._thresholds(hidden.detach(), active)

            passed = (margins > 0) & eligible
            unrouted = without_choice(passed, real)
            chosen = keep_greatest(passed, margins, config.k_max)
            if not self.training or config.training_fallback == "top_1":
                chosen = chosen | best_expert(unrouted, margins, active)
            weights = torch.where(chosen, torch.sigmoid(scores), 0.0)
        return Routing(
            mask=chosen,
            weights=weights,
            aux_losses={},
            unrouted=unrouted,
            statistics={"scores": score_histogram(scores, eligible), "passed": passed.sum().double()},
        )

    def statistics_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of `Routing.statistics`: the histograms of scores, and how many scores passed a threshold."""
        return {"scores": (self.weight.shape[0], NUM_BINS), "passed": ()}

    def observables(self, active: Tensor) -> dict[str, Tensor]:
        """Mean threshold of the live slots `active` [S] bool."""
        return {"threshold": torch.where(active, self.threshold, 0.0).sum() / active.sum().clamp_min(1)}

    @torch.no_grad()
    def update(self, records: RoutingRecords, active: Tensor) -> None:
        """Take in one optimiser step: move the thresholds."""
        num_live, num_tokens = active.sum(), records.num_tokens.double()
        self.num_updates.mul_(num_live == self.num_live).add_(1)
        self.num_live.copy_(num_live)
        step = (1 - self.config.decay) / (1 - self.config.decay ** self.num_updates.double())

        added = (records.num_assignments - records.statistics["passed"]) / num_tokens
        self.added_k.lerp_(added, step)
        share = ((self.config.target_k - self.added_k) / num_live).clamp(0, 1)
        wanted = kth_greatest(records.statistics["scores"], (share * num_tokens).expand(len(active)))
        self.threshold.copy_(torch.where(active, torch.lerp(self.threshold, wanted, step), 0.0))

    def split(self, values: Mapping[str, Tensor], split: SplitExpert) -> dict[str, Tensor]:
        """Thresholds at which each half takes half of the parent's tokens, until the next step sets all anew.

        values: parameters and buffers [S, ...] of the slots by name, the child's threshold copied from the parent's.
        """
        load = int(split.chose_parent.sum())
        if load < 2:
            return {}
        halves, threshold = [split.parent, split.child], values["threshold"].clone()
        rows = values["weight"][halves]
        scores = split.hidden.to(rows.dtype) @ rows.T
        threshold[halves] = torch.stack([halving_threshold(column, load) for column in scores.T]).to(threshold)
        return {"threshold": threshold}

    def _thresholds(self, hidden: Tensor, active: Tensor) -> Tensor:
        """What the scores of hidden [T, D] are compared with: [T, S], in float32 at least."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        share = self.config.target_k / active.sum().double()
        of_tokens = torch.linalg.vector_norm(hidden, dim=1, dtype=dtype)
        of_rows = torch.linalg.vector_norm(self.weight.detach(), dim=1, dtype=dtype)
        start = cosine_quantile(share, hidden.shape[1]).to(dtype) * of_tokens[:, None] * of_rows
        return torch.where(self.num_updates > 0, self.threshold.to(dtype), start)
