"""The step ledger: the one place where a forward pass leaves its auxiliary losses and records."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from dynmoe_ds.distributed import Traffic
from dynmoe_ds.errors import RoutingError
from dynmoe_ds.moe.labels import TokenLabels, counted_part, current_labels
from dynmoe_ds.moe.layer_traffic import LayerTraffic
from dynmoe_ds.routing import Routing, RoutingRecords
from dynmoe_ds.routing.token_kinds import count_kinds

if TYPE_CHECKING:
    from dynmoe_ds.moe.layer import MoELayer
    from dynmoe_ds.moe.token_sampler import TokenSampler

LayerWatch: TypeAlias = Callable[["MoELayer", Literal["input", "aux_loss", "output"], Tensor], None]
"""What a `StepLedger` calls with the values that a layer meets and makes."""

STRAIN = "strain"
"""The name of the strain among the statistics of `RoutingRecords`."""

_current: ContextVar[StepLedger | None] = ContextVar("dynmoe_ds_step_ledger", default=None)


class StepLedger:
    """Collects auxiliary losses and records of all `MoELayer`s that run in training mode inside its `with` block.

        with dm.StepLedger() as ledger:
            loss = criterion(model(x))
        (loss + ledger.aux_loss()).backward()

    Evaluation, padding tokens and the recomputation of activation checkpointing are not counted. Several forward
    passes add up. `dm.initialize` does all this by itself.

    with_strain: whether the records hold `statistics["strain"]` [S] once the backward pass is done: the sum over a
    slot's tokens of combine weight x ‖dL/dy‖, y being the layer's output. It says at which expert the loss pulls most,
    up to a factor common to all. sampler: where to keep a sample of the tokens; None keeps none.

    evaluation: whether layers in evaluation mode are recorded too; their auxiliary losses never are. num_kinds: how
    many kinds of tokens there are; above 0 the records count tokens and experts per kind (`mean_k_per_kind`).
    token_kinds: the kind of each token, int64 of the tokens' shape [B, L], from 0 to num_kinds - 1, negative for none;
    the labels of a forward pass by itself (`labelled`, an engine) come first.

    watch: called with (layer, `input`, hidden [T, D]), (layer, `aux_loss`, its scalar) where there is one, and (layer,
    `output`, y), in this order and without gradients, for every routing that is recorded. Padding is 0 in all of them.
    """

    def __init__(
        self,
        *,
        with_strain: bool = False,
        sampler: TokenSampler | None = None,
        evaluation: bool = False,
        token_kinds: Tensor | None = None,
        num_kinds: int = 0,
        watch: LayerWatch | None = None,
    ) -> None:
        self._with_strain, self._sampler = with_strain, sampler
        self.evaluation = evaluation
        self._token_kinds, self._num_kinds = token_kinds, num_kinds
        self._watch = watch
        self._strain: dict[MoELayer, Tensor] = {}
        self._losses: list[Tensor] = []
        self._records: dict[MoELayer, RoutingRecords] = {}
        self._traffic: dict[MoELayer, LayerTraffic] = {}
        self._tokens: list[Token[StepLedger | None]] = []

    def __enter__(self) -> StepLedger:
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._tokens.pop())

    def aux_loss(self) -> Tensor:
        """Weighted auxiliary losses, summed over layers and forward passes: a differentiable scalar, 0 without any."""
        return torch.stack(self._losses).sum() if self._losses else torch.zeros(())

    def records(self) -> dict[str, RoutingRecords]:
        """Records of this rank by layer name; layers without a name are `layer_0`, `layer_1`, … in order of use."""
        found = {}
        for i, (layer, record) in enumerate(self._records.items()):
            if layer in self._strain:
                record = replace(record, statistics=record.statistics | {STRAIN: self._strain[layer].clone()})
            found[layer.name or f"layer_{i}"] = record
        return found

    def traffic(self) -> dict[str, LayerTraffic]:
        """What this rank has sent to others by layer name, of layers with `ep_size` above 1.

        Backward passes that are done count; the recomputation of activation checkpointing does not, though it sends
        the forward pass once more.
        """
        names = {layer: layer.name or f"layer_{i}" for i, layer in enumerate(self._records)}
        return {names[layer]: traffic for layer, traffic in self._traffic.items()}

    def add(
        self, layer: MoELayer, routing: Routing, hidden: Tensor, real: Tensor | None, shape: tuple[int, ...]
    ) -> None:
        """Note one routing of `layer` over hidden [T, D]; `real` [T] bool is False for padding.

        shape: that of the tokens before they were flattened to [T].
        """
        if self._watch is not None:
            self._watch(layer, "input", hidden.detach())
        weights = layer.router.aux_loss_weights()
        terms = [weights[name] * value for name, value in routing.aux_losses.items()]
        if terms and layer.training:
            # Of one of tp_size ranks that hold the same tokens: their mean, like the loss, is what counts once.
            self._losses.append(torch.stack(terms).sum() / layer.tp_size)
            if self._watch is not None:
                self._watch(layer, "aux_loss", self._losses[-1].detach())
        labels = current_labels()
        if layer.tp_size > 1 and (labels != TokenLabels() or self._token_kinds is not None):
            raise RoutingError("Kinds of tokens cannot be counted yet where ranks share out their tokens (tp_group).")
        if labels.is_counted is not None:
            routing, real = counted_part(routing, real, labels.is_counted)
        kinds = self._token_kinds if labels.kinds is None else labels.kinds
        record = RoutingRecords.of(routing, hidden.detach(), real)
        record = replace(
            record, statistics=record.statistics | count_kinds(routing.mask, real, kinds, self._num_kinds, shape)
        )
        self._records[layer] = self._records[layer] + record if layer in self._records else record
        if self._sampler is not None:
            self._sampler.add(layer, hidden, routing.mask, real)

    def traffic_of(self, layer: MoELayer, mask: Tensor, dtype: torch.dtype) -> Traffic:
        """The counter for the bytes of one call of `layer`, whose tokens go to the slots of mask [T, S] as `dtype`."""
        if layer not in self._traffic:
            self._traffic[layer] = LayerTraffic()
        traffic = self._traffic[layer]
        traffic.expect(mask, layer.ep_size, layer.hidden_size * dtype.itemsize, layer.tp_size)
        return traffic.sent

    def add_output(self, layer: MoELayer, routing: Routing, y: Tensor) -> None:
        """Note the output y [..., D] of a routing of `layer`, and the routing's strain when y's gradient is there."""
        if self._watch is not None:
            self._watch(layer, "output", y.detach())
        if not self._with_strain:
            return
        weights = routing.weights.detach()
        strain = self._strain.setdefault(layer, weights.new_zeros(weights.shape[1], dtype=torch.float64))

        def note(grad: Tensor) -> None:
            rows = grad.detach().reshape(-1, layer.hidden_size)
            strain.add_(torch.linalg.vector_norm(rows, dim=1, dtype=weights.dtype) @ weights)

        if y.requires_grad:
            y.register_hook(note)


def recording_ledger(layer: MoELayer) -> StepLedger | None:
    """The ledger that this call of `layer` must be noted in; None in recomputation and, mostly, in evaluation.

    Raises: RoutingError inside a reentrant activation checkpoint, whose first pass has no graph for the losses.
    """
    ledger = _current.get()
    if ledger is None or not (layer.training or ledger.evaluation) or in_backward():
        return None
    if not torch.is_grad_enabled() and _in_reentrant_checkpoint():
        raise RoutingError(
            f"{layer.name or 'A MoELayer'} runs inside a reentrant activation checkpoint, which loses the auxiliary "
            "losses. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), "
            "gradient_checkpointing_enable({'use_reentrant': False}) or "
            "deepspeed.checkpointing.non_reentrant_checkpoint."
        )
    return ledger


def in_backward() -> bool:
    """Whether autograd is running a backward pass here, as it is when a checkpoint recomputes.

    torch has no public question for this; the private one was True in exactly the recomputing calls in all four
    checkpointing modes of torch and DeepSpeed.
    """
    return torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    """Whether torch's or DeepSpeed's reentrant `CheckpointFunction` is among the callers."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname == "CheckpointFunction.forward":
            return True
        frame = frame.f_back
    return False
