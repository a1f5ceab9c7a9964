"""What all routers over a softmax share: null experts, a balancing bias, combine weights, load balance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe_ds.routing import losses
from dynmoe_ds.routing.balancing_bias import add_selection_bias, bias_faults, move_selection_bias
from dynmoe_ds.routing.logits import gate_logits
from dynmoe_ds.routing.records import RoutingRecords
from dynmoe_ds.routing.router import Router, RouterConfig, Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxConfig(RouterConfig):
    """What can be set for every router over a softmax.

    renormalize: whether the weights of a token's choices sum to 1; else they are the probabilities themselves.
    load_balance_weight: α. bias_update_speed: γ of loss-free balancing, 0 for none (`balancing_bias.py`); it is meant
    to take the place of the load-balance loss. num_null_experts: null experts, which compete with the experts and
    compute nothing. null_expert: what they give, `zero` nothing, `identity` the token's own vector times their weight.
    """

    renormalize: bool
    load_balance_weight: float = 1e-2
    bias_update_speed: float = 0.0
    num_null_experts: int = 0
    null_expert: Literal["zero", "identity"] = "zero"

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        found = bias_faults(self.bias_update_speed)
        if self.num_null_experts < 0:
            found.append(f"router.num_null_experts is {self.num_null_experts} but must not be negative.")
        if self.null_expert not in ("zero", "identity"):
            found.append(f"router.null_expert is {self.null_expert!r}. Use zero or identity.")
        for name, weight in self.aux_loss_weights().items():
            if not weight >= 0:
                found.append(f"router.{name}_weight is {weight} but must not be negative.")
        return found


class SoftmaxScores(NamedTuple):
    """Scores of T tokens for S slots followed by n null experts.

    logits, probs [T, S + n]: −inf and 0 for free slots. competing [S + n] bool: live slots and null experts.
    """

    logits: Tensor
    probs: Tensor
    competing: Tensor

    def log_probs(self) -> Tensor:
        """Logarithms of the probabilities [T, S + n]; 0 for free slots, so that products with `probs` stay 0."""
        return F.log_softmax(self.logits, dim=1).masked_fill(~self.competing, 0.0)


class SoftmaxRouter(Router):
    """`P = softmax(W x)` over live and null experts, of which a subclass chooses some; weights are the chosen P.

    weight [S, D]: gate rows. null_weight [n, D], if there are null experts: theirs, one for all ranks and slots.
    selection_bias [S], with loss-free balancing.

    Null experts are no slots: they cost no communication, count in no record and not in k, and a token that chose only
    them is not unrouted. Weights sum to 1, with `renormalize`, over the chosen experts, and over the chosen null
    experts too where these give something (`identity`). Gradients flow from the weights to P and from the losses to P;
    the choice itself has none. Everything is computed in float32 at least.

    Source of null experts: AdaMoE (arXiv 2406.13233) for `zero`, where weights are normalised over the true experts;
    LongCat-Flash (arXiv 2509.01322) for `identity`.
    """

    config: SoftmaxConfig
    null_weight: nn.Parameter
    selection_bias: Tensor

    def __init__(self, config: SoftmaxConfig, hidden_size: int, num_slots: int) -> None:
        super().__init__(config, hidden_size, num_slots)
        if config.num_null_experts > 0:
            self.null_weight = nn.Parameter(torch.zeros(config.num_null_experts, hidden_size))
            self.shared_parameters = ("null_weight",)
        if config.bias_update_speed > 0:
            add_selection_bias(self)

    @property
    def has_controller(self) -> bool:
        """Whether `update_routers` must be called after every optimiser step."""
        return super().has_controller or self.config.bias_update_speed > 0

    @torch.no_grad()
    def initialize(self, num_experts: int, seed: int) -> None:
        """Draw the null experts' rows, of length 1 as the experts' are."""
        if self.config.num_null_experts > 0:
            rows = torch.randn(self.null_weight.shape, generator=torch.Generator().manual_seed(seed))
            self.null_weight.copy_(F.normalize(rows, dim=1))

    def forward(self, hidden: Tensor, active: Tensor, real: Tensor | None) -> Routing:
        """Route `hidden` [T, D] over the live slots `active` [S] bool; `real` [T] bool is False for padding."""
        num_slots = len(active)
        with torch.autocast(hidden.device.type, enabled=False):
            scores = self._scores(hidden, active)
            chosen = self._choose(self._selection_scores(scores), scores.probs.detach()) & scores.competing
            weights = self._combine_weights(scores, chosen)
            if real is not None:
                chosen = chosen & real[:, None]
                weights = torch.where(chosen, weights, 0.0)
            terms = self._loss_terms(scores, chosen, real)
            aux = {name: terms[name]() for name, factor in self.config.aux_loss_weights().items() if factor > 0}
            passes = self.config.num_null_experts > 0 and self.config.null_expert == "identity"
        return Routing(
            mask=chosen[:, :num_slots],
            weights=weights[:, :num_slots],
            aux_losses=aux,
            unrouted=torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device),
            passed_through=weights[:, num_slots:].sum(1) if passes else None,
        )

    def update(self, records: RoutingRecords, active: Tensor) -> None:
        """Take in one optimiser step: move the balancing bias."""
        if self.config.bias_update_speed > 0:
            move_selection_bias(self.selection_bias, records.tokens_per_slot, active, self.config.bias_update_speed)

    @abstractmethod
    def _choose(self, scores: Tensor, probs: Tensor) -> Tensor:
        """Chosen [T, S + n] bool by `scores` [T, S + n], the biased probabilities; free slots have −inf."""

    @abstractmethod
    def _loss_terms(
        self, scores: SoftmaxScores, chosen: Tensor, real: Tensor | None
    ) -> dict[str, Callable[[], Tensor]]:
        """The auxiliary losses by name; `chosen` [T, S + n] bool is False for padding."""

    def _renormalizes(self) -> bool:
        return self.config.renormalize

    def _scores(self, hidden: Tensor, active: Tensor) -> SoftmaxScores:
        rows: Tensor = self.weight
        competing = active
        if self.config.num_null_experts > 0:
            rows = torch.cat([self.weight, self.null_weight])
            competing = F.pad(active, (0, self.config.num_null_experts), value=True)
        logits = gate_logits(hidden, rows).masked_fill(~competing, -torch.inf)
        return SoftmaxScores(logits=logits, probs=torch.softmax(logits, dim=1), competing=competing)

    def _selection_scores(self, scores: SoftmaxScores) -> Tensor:
        selection = scores.probs.detach()
        if self.config.bias_update_speed > 0:
            bias = F.pad(self.selection_bias, (0, self.config.num_null_experts))
            selection = selection + bias.to(selection.dtype)
        return selection.masked_fill(~scores.competing, -torch.inf)

    def _combine_weights(self, scores: SoftmaxScores, chosen: Tensor) -> Tensor:
        """Weights [T, S + n], 0 off the chosen; a `zero` null expert's is of no use."""
        if not self._renormalizes():
            return torch.where(chosen, scores.probs, 0.0)
        counted = chosen
        if self.config.num_null_experts > 0 and self.config.null_expert == "zero":
            counted = chosen & (torch.arange(chosen.shape[1], device=chosen.device) < self.weight.shape[0])
        # P / Σ P as a softmax of their logits, which cannot divide 0 by 0. Rows with nothing to weigh are left whole.
        kept = counted | ~counted.any(1, keepdim=True)
        shares = torch.softmax(scores.logits.masked_fill(~kept, -torch.inf), dim=1)
        return torch.where(counted, shares, 0.0)

    def _load_balance(self, scores: SoftmaxScores, chosen: Tensor, real: Tensor | None, total: Tensor) -> Tensor:
        """`M Σ_i f_i Q_i` over the M live and null experts; `total` is what the choices are divided by for f.

        f of every null expert is the mean over them, so that no balance is asked for among them (AdaMoE).
        """
        frequency = chosen.sum(0).to(scores.probs.dtype) / total.clamp_min(1)
        if num_null := self.config.num_null_experts:
            nulls = frequency[-num_null:]
            frequency = torch.cat([frequency[:-num_null], nulls.mean().expand(num_null)])
        return losses.probability_balance(frequency, scores.probs, scores.competing.sum(), real)
