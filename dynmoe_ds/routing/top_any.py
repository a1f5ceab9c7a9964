"""Top-any gating: every expert has a threshold, and a token takes every expert whose score passes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dynmoe_ds.routing import losses
from dynmoe_ds.routing.balancing_bias import SELECTION_BIAS, add_selection_bias, bias_faults, move_selection_bias
from dynmoe_ds.routing.budget import Budget, BudgetConfig
from dynmoe_ds.routing.choice import best_expert, eligible_pairs, keep_greatest, without_choice
from dynmoe_ds.routing.cosine import cosine_gates, cosine_quantile, cosine_scores
from dynmoe_ds.routing.logits import gate_logits
from dynmoe_ds.routing.records import RoutingRecords
from dynmoe_ds.routing.router import Router, RouterConfig, Routing, register_router
from dynmoe_ds.routing.splitting import SplitExpert, halving_threshold


@dataclass(frozen=True, kw_only=True, slots=True)
class TopAnyConfig(RouterConfig):
    """Top-any gating as in the paper; `recommended()` holds the best defaults known, `authors_code()` the later losses,
    `budgeted()` the best defaults at a mean number of experts that you choose.

    score: what is compared with the thresholds, the paper's `cosine`, or with `softmax` log(K P), P being a softmax
    over the K live experts: 0 for an expert that a token would take as often by chance. temperature: τ in σ(τ s) and in
    the softmax. weighting: `average` gives every chosen expert 1/k, `softmax` its share of exp(τ s) among the chosen
    ones. straight_through: which margins the gate's gradient reaches, `all_live` (paper) or `active_only` (the authors'
    code). training_fallback: what happens in training to a token without an open gate, `none` (its output is zero) or
    `top_1` (its best live expert, whose forced gate keeps its gradient); at evaluation it is always `top_1`.
    fallback_by: which expert is the best there, the one with the greatest `margin` or, as in the authors' code, with
    the greatest `score` whatever the thresholds. Each auxiliary loss has its own full weight, without a common factor;
    price_weight is per open expert and token, efficiency_weight per share of the live experts that are open.
    load_balance_gradient: what the load-balance loss differentiates, the published `gates`, which closes them too, or
    the `shares` g/k, which only moves load (see `losses.load_balance`). k_max: most experts per token; of its open
    gates those with the greatest margins stay, the others count as closed. budget: mean number of experts per token to
    hold, by an offset common to the layer's thresholds; the thresholds themselves then say only how experts differ:
    their mean over the live experts is taken away. bias_update_speed: γ of loss-free balancing in units of the cosine,
    0 for none (`balancing_bias.py`).
    Source: arXiv 2405.14297 §3.1 and §3.3; the terms after simplicity come from the authors' later code, price, budget
    and the recommended values from the study summed up in docs/decisions.md.
    """

    may_leave_unrouted: ClassVar[bool] = True

    score: Literal["cosine", "softmax"] = "cosine"
    temperature: float = 1.0
    weighting: Literal["average", "softmax"] = "average"
    straight_through: Literal["active_only", "all_live"] = "all_live"
    training_fallback: Literal["none", "top_1"] = "none"
    fallback_by: Literal["margin", "score"] = "margin"
    diversity_weight: float = 0.01
    simplicity_weight: float = 0.01
    load_balance_weight: float = 0.0
    load_balance_gradient: Literal["gates", "shares"] = "gates"
    efficiency_weight: float = 0.0
    price_weight: float = 0.0
    k_max: int | None = None
    budget: BudgetConfig | None = None
    bias_update_speed: float = 0.0

    @classmethod
    def authors_code(cls) -> TopAnyConfig:
        """The losses (four terms, 0.01 each), straight-through gradient and fallback of the authors' public code."""
        return cls(
            straight_through="active_only", fallback_by="score", load_balance_weight=0.01, efficiency_weight=0.01
        )

    @classmethod
    def recommended(cls) -> TopAnyConfig:
        """The best defaults known: a softmax, its shares as weights, a top-1 floor, balance, a price per expert."""
        return cls(
            score="softmax",
            weighting="softmax",
            training_fallback="top_1",
            diversity_weight=0.0,
            simplicity_weight=0.0,
            load_balance_weight=0.01,
            load_balance_gradient="shares",
            price_weight=0.01 / 16,
        )

    @classmethod
    def budgeted(cls, target_k: float = 2.0) -> TopAnyConfig:
        """As `recommended()`, with `target_k` experts per token on average; the budget takes the place of the price.

        The load-balance loss is the published one: that it closes gates, too, does no harm where the budget opens them.
        """
        budget = BudgetConfig(target_k=target_k)
        return replace(cls.recommended(), load_balance_gradient="gates", price_weight=0.0, budget=budget)

    @property
    def most_experts(self) -> int | None:
        """`k_max`."""
        return self.k_max

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        found = []
        choices = {
            "score": ("cosine", "softmax"),
            "weighting": ("average", "softmax"),
            "straight_through": ("active_only", "all_live"),
            "training_fallback": ("none", "top_1"),
            "fallback_by": ("margin", "score"),
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
        if self.k_max is not None and self.k_max < 1:
            found.append(f"router.k_max is {self.k_max} but must be at least 1.")
        if self.budget is not None:
            found += self.budget.faults(self.k_max, k_min=1 if self.training_fallback == "top_1" else 0)
        return found + bias_faults(self.bias_update_speed)

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
    top_any_budget=TopAnyConfig.budgeted,
)
class TopAnyRouter(Router):
    """`g_e(x) = [s_e > G_e]` with a straight-through gradient through `σ(τ s_e) − σ(τ G_e)`, `s_e = cos(x, w_e)`.

    weight [S, D]: gate rows. threshold [S]: G. With `score: softmax` s_e is `log(K P_e)`, P = softmax(W x) over the K
    live experts: an expert is measured against the others for this token, so that `exp(τ s)` among the chosen ones is P
    renormalised (at τ = 1), and G keeps its meaning when K changes.

    Which terms carry gradient: the combine weights depend on the gates of the chosen experts only, since the output of
    an expert that did not run is unknown. So a closed gate gets none from the output; with `all_live` it gets some from
    the load-balance, efficiency and price losses, with `active_only` it gets none at all. With `average` the number of
    open gates k is a constant in the backward pass, as in the paper. With `softmax` the weight is g_e exp(τ s_e) / Σ g
    exp(τ s) over the chosen experts, differentiated as a whole: a gate gains by how much its expert is better than the
    token's mixture, not by whether the output should be larger, which would open or close all gates together.
    Diversity and simplicity reach the rows alone. A gate that `k_max` closes is a closed gate in all of this.

    With a budget `G_e − mean(G) + offset` takes the place of `G_e`, the mean over the live experts. The offset is the
    budget's control value plus the threshold that would let the target through if tokens pointed everywhere alike, and
    so follows the number of live experts without delay, plus `level`, by which a split keeps the thresholds of
    the other experts where they are. Without the centring, controller and parameters would race each other. A balancing
    bias, centred too so that it moves load and not k, lowers its expert's threshold; the weights do not see it.

    Source: arXiv 2405.14297 §3.1. Ours compares scores with thresholds before the sigmoid (equal for τ > 0), where
    small thresholds keep their precision, and works in float32 whatever the model's dtype.
    """

    config: TopAnyConfig
    selection_bias: Tensor
    level: Tensor

    def __init__(self, config: TopAnyConfig, hidden_size: int, num_slots: int) -> None:
        super().__init__(config, hidden_size, num_slots)
        self.threshold = nn.Parameter(torch.zeros(num_slots))
        if config.bias_update_speed > 0:
            add_selection_bias(self)
        if config.budget is not None:
            # In units of the deviation of random tokens' scores. The next step's k answers to the control value at
            # once, so a proportional part would make it swing and not settle earlier: docs/routers.md. The limits take
            # any cosine to any other, and log P to where float32 sees no more of P.
            is_cosine = config.score == "cosine"
            self.budget = Budget(
                config.budget,
                proportional_gain=0.0,
                integral_gain=0.8 / hidden_size**0.5 if is_cosine else 0.8,
                limit=2.0 if is_cosine else 16.0,
                k_max=config.k_max,
            )
            self.register_buffer("level", torch.zeros((), dtype=torch.float64))

    @property
    def has_controller(self) -> bool:
        """Whether `update_routers` must be called after every optimiser step."""
        return super().has_controller or self.config.bias_update_speed > 0

    def forward(self, hidden: Tensor, active: Tensor, real: Tensor | None) -> Routing:
        """Route `hidden` [T, D] over the live slots `active` [S] bool; `real` [T] bool is False for padding."""
        config = self.config
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = self.weight.to(dtype)
            threshold = self._thresholds(self.threshold.to(dtype), self._buffers.get(SELECTION_BIAS), active)
            rows = losses.unit_rows(weight, active)
            eligible = eligible_pairs(active, real, len(hidden))
            if config.score == "cosine":
                scores, chosen = cosine_gates(hidden, rows, threshold, active)
                chosen = chosen & eligible
            else:
                scores = self._scores(hidden, weight, rows, active)
                chosen = (scores > threshold) & eligible
            margins = torch.sigmoid(config.temperature * scores) - torch.sigmoid(config.temperature * threshold)
            unrouted = without_choice(chosen, real)
            chosen = keep_greatest(chosen, margins, config.k_max)
            if not self.training or config.training_fallback == "top_1":
                chosen = chosen | best_expert(unrouted, margins if config.fallback_by == "margin" else scores, active)

            reached = eligible if config.straight_through == "all_live" else chosen
            gates = chosen.to(dtype) + torch.where(reached, margins - margins.detach(), 0.0)
            weights = self._combine_weights(gates, scores, chosen)
            aux = self._aux_losses(gates, weight, rows, active, real)
        return Routing(mask=chosen, weights=weights, aux_losses=aux, unrouted=unrouted)

    def update(self, records: RoutingRecords, active: Tensor) -> None:
        """Take in one optimiser step: move the balancing bias."""
        if self.config.bias_update_speed > 0:
            move_selection_bias(self.selection_bias, records.tokens_per_slot, active, self.config.bias_update_speed)

    def split(self, values: Mapping[str, Tensor], split: SplitExpert) -> dict[str, Tensor]:
        """Thresholds at which each half takes half of the parent's tokens; all other experts keep theirs.

        values: parameters and buffers [S, ...] of the slots by name, the child's copied from the parent's.
        """
        halves = [split.parent, split.child]
        before = split.active.clone()
        before[split.child] = False
        threshold, bias = values["threshold"], values.get(SELECTION_BIAS)
        wanted = self._thresholds(threshold, bias, before).clone()
        load = int(split.chose_parent.sum())
        if load >= 2:
            rows = losses.unit_rows(values["weight"], split.active)
            scores = self._scores(split.hidden.to(rows.dtype), values["weight"], rows, split.active)[:, halves]
            wanted[halves] = torch.stack([halving_threshold(column, load) for column in scores.T]).to(wanted.dtype)
        shift = torch.where(split.active, wanted - self._thresholds(threshold, bias, split.active), 0.0)
        if self.budget is None:
            return {"threshold": threshold + shift}
        # Centring takes away what all thresholds move by together.
        return {
            "threshold": threshold + torch.where(split.active, _centred(shift, split.active), 0.0),
            "level": self.level + shift.sum() / split.active.sum(),
        }

    def _scores(self, hidden: Tensor, weight: Tensor, rows: Tensor, active: Tensor) -> Tensor:
        """Scores [T, S], 0 for free slots; `rows` [S, D] are the `weight` [S, D] of the live slots at length 1."""
        if self.config.score == "cosine":
            return cosine_scores(hidden, rows)
        logits = gate_logits(hidden, weight).masked_fill(~active, -torch.inf)
        return torch.where(active, torch.log_softmax(logits, dim=1) + active.sum().to(logits.dtype).log(), 0.0)

    def _thresholds(self, threshold: Tensor, bias: Tensor | None, active: Tensor) -> Tensor:
        """What scores are compared with [S]: the parameters `threshold` [S], moved by balancing bias [S] and budget."""
        if bias is not None:
            threshold = threshold - _centred(bias.to(threshold.dtype), active)
        if self.budget is not None:
            num_live = active.sum()
            start = self._quantile(self.budget.target(num_live) / num_live)
            threshold = _centred(threshold, active) + (start + self.level + self.budget.control).to(threshold.dtype)
        return threshold

    def _quantile(self, share: Tensor) -> Tensor:
        """The score that `share` of the experts exceed, before training, for tokens that point everywhere alike."""
        if self.config.score == "cosine":
            return cosine_quantile(share, self.weight.shape[1])
        # Rows of length 1 and normalised tokens (of root mean square 1) have standard normal logits z, and then
        # log(K P) is about z − log E[exp z] = z − 1/2.
        return -torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)) - 0.5

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


def _centred(values: Tensor, active: Tensor) -> Tensor:
    """`values` [S] less their mean over the live slots; without meaning in free ones."""
    return values - torch.where(active, values, 0.0).sum() / active.sum()
