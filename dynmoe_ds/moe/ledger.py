"""The step ledger: the one place where a forward pass leaves its auxiliary losses and records."""

from __future__ import annotations

import sys
from contextvars import ContextVar, Token
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynmoe_ds.errors import RoutingError
from dynmoe_ds.routing import Routing, RoutingRecords

if TYPE_CHECKING:
    from dynmoe_ds.moe.layer import MoELayer

_current: ContextVar[StepLedger | None] = ContextVar("dynmoe_ds_step_ledger", default=None)


class StepLedger:
    """Collects auxiliary losses and records of all `MoELayer`s that run in training mode inside its `with` block.

        with dm.StepLedger() as ledger:
            loss = criterion(model(x))
        (loss + ledger.aux_loss()).backward()

    Evaluation, padding tokens and the recomputation of activation checkpointing are not counted. Several forward
    passes add up. `dm.initialize` does all this by itself.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._records: dict[MoELayer, RoutingRecords] = {}
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
        return {layer.name or f"layer_{i}": record for i, (layer, record) in enumerate(self._records.items())}

    def add(self, layer: MoELayer, routing: Routing, hidden: Tensor, real: Tensor | None) -> None:
        """Note one routing of `layer` over hidden [T, D]; `real` [T] bool is False for padding."""
        weights = layer.router.aux_loss_weights()
        terms = [weights[name] * value for name, value in routing.aux_losses.items()]
        if terms:
            self._losses.append(torch.stack(terms).sum())
        record = RoutingRecords.of(routing, hidden.detach(), real)
        self._records[layer] = self._records[layer] + record if layer in self._records else record


def recording_ledger(layer: MoELayer) -> StepLedger | None:
    """The ledger that this call of `layer` must be noted in; None in evaluation and in recomputation.

    Raises: RoutingError inside a reentrant activation checkpoint, whose first pass has no graph for the losses.
    """
    ledger = _current.get()
    if ledger is None or not layer.training or in_backward():
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
