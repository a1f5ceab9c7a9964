"""The engine: DeepSpeed's, with auxiliary losses in `backward` and growing experts in `step`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_ds.adaptation import (
    AdaptationConfig,
    AdaptationController,
    AdaptationEvent,
    Plan,
    RecordingWindow,
    add_records,
    describe,
    operate,
)
from dynmoe_ds.distributed import raise_together
from dynmoe_ds.engine import seam
from dynmoe_ds.engine.clipping import clip_gradients
from dynmoe_ds.engine.masters import EngineMasters
from dynmoe_ds.errors import CheckpointError, RoutingError
from dynmoe_ds.moe import MoELayer, PaddingMask, Placement, StepLedger
from dynmoe_ds.routing import RoutingRecords, update_routers
from dynmoe_ds.routing.records import pack, unpack

_log = logging.getLogger(__name__)

_NATIVE_CHECKPOINT_METHODS = ("save_16bit_model", "save_fp16_model", "load_universal_checkpoint")


class Engine:
    """Made by `dynmoe_ds.initialize`. Whatever is not defined here is DeepSpeed's engine's.

    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        layers: Mapping[str, MoELayer],
        adaptation: AdaptationConfig | None,
        padding: PaddingMask,
        gradient_clipping: float,
    ) -> None:
        self._deepspeed = deepspeed_engine
        self._layers = dict(layers)
        self._adaptation = adaptation
        self._controller = AdaptationController(adaptation) if adaptation else None
        self._window = RecordingWindow(adaptation) if adaptation else None
        self._padding = padding
        self._clipping = gradient_clipping
        self._ledger = StepLedger()
        self._step_records: dict[str, RoutingRecords] = {}
        self._untaken_records: dict[str, RoutingRecords] = {}
        self._untaken_events: list[AdaptationEvent] = []
        self._gradient_norm: float | None = None
        self._layers_known_full: set[str] = set()
        self.last_aux_loss: Tensor = torch.zeros(())
        self.masters = EngineMasters(deepspeed_engine)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass. In training mode its layers' losses and records are kept for `backward`, `step`."""
        if not (self.module.training and torch.is_grad_enabled()):
            return self._deepspeed(*args, **kwargs)
        with self._ledger:
            return self._deepspeed(*args, **kwargs)

    forward = __call__

    def backward(self, loss: Tensor) -> Tensor:
        """Backward pass of `loss` plus the auxiliary losses of all forward passes since the last call; gives that sum.

        Collective: every rank.
        """
        ledger, self._ledger = self._ledger, StepLedger()
        aux_loss = ledger.aux_loss().to(loss.device)
        self.last_aux_loss = aux_loss.detach()
        total = loss + aux_loss
        self._deepspeed.backward(total)
        self._padding.backward_done()
        self._step_records = add_records(self._step_records, ledger.records())
        return total.detach()

    def step(self) -> None:
        """Optimiser step at the end of gradient accumulation, followed by an adaptation when one is due.

        Collective: every rank. Raises: RoutingError if a forward pass was not followed by `engine.backward`.
        """
        if self._ledger.records():
            raise RoutingError(
                "engine.step() after a forward pass in training mode without engine.backward(loss): the auxiliary "
                "losses are missing from the gradients. Call engine.backward(loss), not loss.backward()."
            )
        is_boundary = self._deepspeed.is_gradient_accumulation_boundary()
        if is_boundary and self.zero_stage == 0:
            self._gradient_norm = float(clip_gradients(self.module, self._layers.values(), self._clipping))
        self._deepspeed.step()
        if not is_boundary:
            return
        if self.zero_stage > 0:
            norm = self._deepspeed.get_global_grad_norm()
            self._gradient_norm = None if norm is None else float(norm)
        records, self._step_records = self._step_records, {}
        self._untaken_records = add_records(self._untaken_records, records)
        self._update_routers(records)
        if self._window is not None:
            self._window.add(self.global_steps, records)
            if self._window.is_due(self.global_steps):
                self._adapt()

    def apply_plan(self, plan: Plan) -> Plan:
        """Carry out a plan of one's own between `step()` and the next forward; the plan with the parents chosen.

        Collective: every rank, with the same plan. Raises: DivergenceError if the plans differ, PlacementError if the
        plan contradicts the placements; nothing has been changed then.
        """
        return operate(plan, self._layers, self.masters, self._adaptation)

    def take_records(self, reduce: bool = True) -> dict[str, RoutingRecords]:
        """Records by layer of the optimiser steps since the last call.

        Collective if `reduce`: every rank, and the records are summed over them; else they are this rank's own.
        """
        records, self._untaken_records = self._untaken_records, {}
        return self._reduce(records) if reduce else records

    def take_events(self) -> list[AdaptationEvent]:
        """The adaptations since the last call."""
        events, self._untaken_events = self._untaken_events, []
        return events

    def placements(self) -> dict[str, Placement]:
        """Which slot holds which expert, by layer."""
        return {name: layer.placement for name, layer in self._layers.items()}

    def gradient_norm(self) -> float | None:
        """Global 2-norm of the last step's gradients before clipping; None before the first step."""
        return self._gradient_norm

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group."""
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def train(self, mode: bool = True) -> Engine:
        """Training mode, as of a module."""
        self._deepspeed.train(mode)
        return self

    def eval(self) -> Engine:
        """Evaluation mode: nothing is recorded, and every token gets at least one expert."""
        return self.train(False)

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._deepspeed.module

    @property
    def zero_stage(self) -> int:
        return self._deepspeed.zero_optimization_stage()

    @property
    def global_steps(self) -> int:
        """Optimiser steps so far."""
        return self._deepspeed.global_steps

    def save_checkpoint(self, *_: Any, **__: Any) -> NoReturn:
        """Raises: CheckpointError always, since checkpoints of growing pools are not there yet."""
        _refuse("save_checkpoint")

    def load_checkpoint(self, *_: Any, **__: Any) -> NoReturn:
        """Raises: CheckpointError always, since checkpoints of growing pools are not there yet."""
        _refuse("load_checkpoint")

    def __getattr__(self, name: str) -> Any:
        if name in _NATIVE_CHECKPOINT_METHODS:
            _refuse(name)
        if name == "_deepspeed":  # not set yet: copying or unpickling
            raise AttributeError(name)
        return getattr(self._deepspeed, name)

    def _adapt(self) -> None:
        """Decide on the window's records of all ranks, compare, operate, note. Collective: every rank."""
        assert self._window is not None and self._controller is not None and self._adaptation is not None
        config, step = self._adaptation, self.global_steps
        before = self.placements()
        records = self._reduce(self._window.take())
        decided, error = None, None
        try:
            decided = self._controller.decide(records, before, step=step)
        except Exception as e:
            # A rule of the user's own may fail on one rank only; the others must not wait for it.
            error = e
        raise_together(error)
        assert decided is not None
        plan, full = decided
        plan = self.apply_plan(plan)
        event = describe(
            plan,
            step=step,
            window_steps=config.window_steps,
            rule=config.rule,
            records=records,
            before=before,
            after=self.placements(),
            full=full,
        )
        self._untaken_events.append(event)
        if full - self._layers_known_full and dist.get_rank() == 0:
            _log.warning(
                "Step %d: %s wanted a new expert but has no free slot. Build it with more num_slots, or prune more.",
                step,
                ", ".join(sorted(full - self._layers_known_full)),
            )
        self._layers_known_full |= full

    def _reduce(
        self, records: dict[str, RoutingRecords], layers: Mapping[str, MoELayer] | None = None
    ) -> dict[str, RoutingRecords]:
        """Records of `layers` (default: all) summed over all data-parallel ranks, in one collective.

        Every layer takes part, also one without records here, so that all ranks send the same.
        """
        layers = self._layers if layers is None else layers
        everything = {name: records.get(name) or _no_records(layer) for name, layer in layers.items()}
        flat = pack(everything)
        if dist.get_world_size() > 1:
            dist.all_reduce(flat, group=seam.data_parallel_group())
        return unpack(flat, everything)

    def _update_routers(self, records: dict[str, RoutingRecords]) -> None:
        """Let the routers' controllers take in an optimiser step. Collective if any router has one: every rank."""
        controlled = {name: layer for name, layer in self._layers.items() if layer.router.has_controller}
        if controlled:
            reduced = self._reduce(records, controlled)
            update_routers(
                {name: layer.router for name, layer in controlled.items()},
                reduced,
                {name: layer.active for name, layer in controlled.items()},
            )


def _no_records(layer: MoELayer) -> RoutingRecords:
    return RoutingRecords.zeros(
        layer.num_slots, layer.hidden_size, layer.router.statistics_shapes(), layer.active.device
    )


def _refuse(method: str) -> NoReturn:
    raise CheckpointError(
        f"engine.{method} is not available: DeepSpeed's own checkpoints load rank 0's experts on all ranks without an "
        "error, and dynmoe_ds has none of its own yet."
    )
