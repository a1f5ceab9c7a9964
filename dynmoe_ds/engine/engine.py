"""The engine: DeepSpeed's, with auxiliary losses in `backward` and growing experts in `step`."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_ds.adaptation import (
    AdaptationConfig,
    AdaptationEvent,
    Plan,
    operate,
)
from dynmoe_ds.checkpoint.in_memory import SnapshotInMemory
from dynmoe_ds.checkpoint.store import find_checkpoint, open_checkpoint
from dynmoe_ds.checkpoint.writer import CheckpointWriter
from dynmoe_ds.distributed import assert_same_on_all_ranks, attempt_together, group_timeout
from dynmoe_ds.engine.adapting import EngineAdaptation
from dynmoe_ds.engine.clipping import clip_gradients
from dynmoe_ds.engine.construction import Construction
from dynmoe_ds.engine.left_out import drop_gradients, leave_out_update
from dynmoe_ds.engine.masters import EngineMasters
from dynmoe_ds.engine.non_finite import (
    MAX_LEFT_OUT_IN_A_ROW,
    NonFinite,
    NonFiniteWatch,
    OnNonFinite,
    norm_is_not_finite,
)
from dynmoe_ds.engine.random_state import restore_rng, rng_state
from dynmoe_ds.engine.snapshot import COUNTERS, restore, restore_own, take_snapshot
from dynmoe_ds.engine.tensor_parallel import tp_size_of
from dynmoe_ds.errors import CheckpointError, DivergenceError, NonFiniteError, PlacementError, RoutingError
from dynmoe_ds.moe import (
    LayerTraffic,
    MoELayer,
    PaddingMask,
    Placement,
    StepLedger,
    labelled,
)
from dynmoe_ds.routing import RoutingRecords, update_routers

_log = logging.getLogger(__name__)

_NATIVE_CHECKPOINT_METHODS = (
    "save_16bit_model",
    "save_fp16_model",
    "load_universal_checkpoint",
    "load_state_dict",
    "load_module_state_dict",
    "load_moe_state_dict",
)


class Engine:
    """Made by `dynmoe_ds.initialize`. Whatever is not defined here is DeepSpeed's engine's.

    host_group: all ranks, on host memory, so that an agreement waits for no accelerator; None for the default group.

    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    """

    def __init__(
        self,
        construction: Construction,
        layers: Mapping[str, MoELayer],
        adaptation: AdaptationConfig | None,
        padding: PaddingMask,
        gradient_clipping: float,
        token_kinds: tuple[str, ...] = (),
        on_non_finite: OnNonFinite = "stop",
    ) -> None:
        self._construction = construction
        self._deepspeed = construction.build()
        self.masters = EngineMasters(self._deepspeed)
        self._layers = dict(layers)
        self.adaptation = EngineAdaptation(adaptation, self._layers, len(token_kinds))
        self.records = self.adaptation.records
        self._padding = padding
        self._clipping = gradient_clipping
        self.token_kinds = token_kinds
        self.on_non_finite = on_non_finite
        self._ledger = StepLedger()
        self._traffic: dict[str, LayerTraffic] = {}
        self._gradient_norm: float | None = None
        # Process groups are made now, since a store that is gone later, such as torchrun's, makes none any more.
        self._writer = CheckpointWriter()
        self.host_group = _group_on_host()
        self.last_aux_loss: Tensor = torch.zeros(())
        self._watch = NonFiniteWatch()
        self._watch.attach(self._deepspeed)
        self._first_counters: dict[str, int] = {}
        self._num_left_out_in_a_row = 0

    def __call__(self, *args: Any, token_kinds: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's forward pass. In training mode its layers' losses and records are kept for `backward`, `step`.

        token_kinds: the kind of every token, int64 of the tokens' shape [B, L], an index into the names that
        `initialize` was given, or -1 for none. The model does not see it.
        Raises: RoutingError for `token_kinds` that is no int64 tensor, or that nobody declared. A wrong shape and a
        kind that is too large are found where the records are read (`mean_k_per_kind`), on all ranks together.
        """
        self._check_kinds(token_kinds)
        is_recorded = self.module.training and torch.is_grad_enabled()
        if is_recorded and not self._ledger.records():
            self._ledger = self._new_ledger()
        with labelled(kinds=token_kinds), self._ledger if is_recorded else nullcontext():
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
        self._first_counters = self._first_counters or self._counters()
        with self._watch.backward(loss):
            self._deepspeed.backward(total)
        self._padding.backward_done()
        self.records.add_micro_step(ledger.records())
        for name, traffic in ledger.traffic().items():
            self._traffic[name] = self._traffic.get(name, LayerTraffic()) + traffic
        return total.detach()

    def step(self) -> None:
        """Optimiser step at the end of gradient accumulation, followed by an adaptation when one is due.

        An update is made only from finite numbers. Otherwise `on_non_finite` decides: `stop` raises; `skip_step` leaves
        the update out, and the step's records with it, and counts the step in `global_steps` and `skipped_steps`.

        Collective: every rank. Raises: RoutingError if a forward pass was not followed by `engine.backward`;
        NonFiniteError on every rank, with the engine as it was before the step's first forward pass, random number
        generators excepted.
        """
        if self._ledger.records():
            raise RoutingError(
                "engine.step() after a forward pass in training mode without engine.backward(loss): the auxiliary "
                "losses are missing from the gradients. Call engine.backward(loss), not loss.backward()."
            )
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()
            return
        found = self._update()
        records = self.records.take_step()
        if found is None:
            self._num_left_out_in_a_row = 0
            self._take_in(records)
        else:
            self._leave_out(found)
        self._first_counters = {}
        if self.adaptation.is_due(self.global_steps):
            self.adaptation.adapt(self.global_steps, lambda: self.masters, self.resize_slots)

    def apply_plan(self, plan: Plan) -> Plan:
        """Carry out a plan of one's own between `step()` and the next forward; the plan with the parents chosen.

        Collective: every rank, with the same plan. Raises: DivergenceError if the plans differ, PlacementError if the
        plan contradicts the placements; nothing has been changed then.
        """
        self.records.close()
        before = self.placements()
        plan = operate(plan, self._layers, self.masters, self.adaptation.config)
        self.adaptation.lives.note(self.global_steps, self.placements())
        self.records.renumber(before)
        return plan

    def resize_slots(self, num_slots: int | Mapping[str, int]) -> None:
        """Give every layer, or the layers named, a pool of another size: memory follows it.

        Weights, masters, moments, counters, records and placements are carried over as by a checkpoint, in memory, to a
        DeepSpeed engine that is made anew: losses go on as if nothing had happened. Experts stay on their ranks as far
        as they fit. It takes about as long as building the engine, and on the host one copy of weights, masters and
        moments, shared out among the ranks. `engine.module` stays; parameters, optimiser and scheduler are other
        objects afterwards.

        Only between `step()` and the next forward pass. Collective: every rank, with the same sizes. Raises:
        PlacementError for a size that cannot hold the live experts or be shared by the ranks, SurgeryError or
        CheckpointError for an optimiser whose state cannot be carried over, DivergenceError if the sizes differ; on
        every rank, before anything is changed.
        """
        self._check_between_steps("The pools were to be resized")
        self._check_no_shards("Pools of another size do")
        wanted = dict.fromkeys(self._layers, num_slots) if isinstance(num_slots, int) else dict(num_slots)
        assert_same_on_all_ranks("the sizes of the pools", wanted)
        for name, count in wanted.items():
            if name not in self._layers:
                raise PlacementError(f"There is no layer called {name!r}. Layers: {', '.join(self._layers)}.")
            try:
                self._layers[name].placement.resized(count)
            except PlacementError as error:
                raise PlacementError(f"{name}: {error}") from None
        if all(count == self._layers[name].num_slots for name, count in wanted.items()):
            return
        self._construction.check_removable()
        attempt_together(self.masters.check_states)
        self.records.close()
        before, group, rng = self.placements(), self.host_group, rng_state()
        restore(self, SnapshotInMemory(take_snapshot(self, None), group), group, self._num_slots() | wanted)
        self.records.renumber(before)
        restore_rng(rng)

    def expert_memory(self) -> dict[str, int]:
        """Bytes of this rank's experts, free slots included: `weights`, `gradients`, `masters` and `moments`.

        gradients: what is held of them now; most after `backward`, at ZeRO-3 always. masters: 0 where the weights are
        their own, in float32 at ZeRO-0.
        """
        return self.masters.memory_of(p for layer in self._layers.values() for p in layer.experts.parameters())

    def take_records(self, reduce: bool = True) -> dict[str, RoutingRecords]:
        """Records by layer of the optimiser steps since the last call, by the slots of the placements as they are.

        Tokens of experts that are gone are in the totals only. Collective if `reduce`: every rank, and the records are
        summed over them; else their sum over ranks is what counts.
        """
        return self.records.take(reduce=reduce)

    def take_traffic(self) -> dict[str, LayerTraffic]:
        """What this rank has sent to other ranks since the last call, by the names of layers with `ep_size` above 1."""
        traffic, self._traffic = self._traffic, {}
        return traffic

    def take_records_by_placement(self) -> list[tuple[dict[str, Placement], dict[str, RoutingRecords]]]:
        """As `take_records`, but with the records from before the last change of the pools apart, under theirs.

        Collective: every rank; the records are summed over them.
        """
        return self.records.take_by_placement()

    def evaluation_ledger(self) -> StepLedger:
        """A ledger that records evaluation too: `with engine.evaluation_ledger() as ledger:` around the passes.

        `engine.sum_over_ranks(ledger.records())` then has what all ranks saw. Of training, which has its own ledger,
        it sees nothing.
        """
        return StepLedger(evaluation=True, num_kinds=len(self.token_kinds))

    def sum_over_ranks(self, records: dict[str, RoutingRecords]) -> dict[str, RoutingRecords]:
        """Records by layer summed over all data-parallel ranks, every layer of the model included.

        Collective: every rank.
        """
        return self.records.reduce(records)

    def last_loads(self) -> dict[str, dict[int, int]]:
        """Tokens by layer and expert id of the last optimiser step, over all ranks; no expert that came after it.

        Collective: every rank.
        """
        return self.records.last_loads()

    def observables(self) -> dict[str, dict[str, float]]:
        """The values of the routers' controllers by layer and name; equal on all ranks. Waits for the device once."""
        found = {
            (layer_name, name): value.detach().double().reshape(())
            for layer_name, layer in self._layers.items()
            for name, value in layer.router.observables(layer.active).items()
        }
        numbers = torch.stack(list(found.values())).tolist() if found else []
        by_layer: dict[str, dict[str, float]] = {}
        for (layer_name, name), number in zip(found, numbers, strict=True):
            by_layer.setdefault(layer_name, {})[name] = number
        return by_layer

    def take_events(self) -> list[AdaptationEvent]:
        """The adaptations since the last call."""
        events, self.adaptation.events = self.adaptation.events, []
        return events

    def placements(self) -> dict[str, Placement]:
        """Which slot holds which expert, by layer."""
        return {name: layer.placement for name, layer in self._layers.items()}

    def gradient_norm(self) -> float | None:
        """Global 2-norm of the last step's gradients before clipping; None before the first, or if it was left out."""
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

    def rebuild(self, placements: Mapping[str, Placement]) -> None:
        """Another DeepSpeed engine, at its start with weights of zero, for these placements; for `restore` alone.

        Collective: every rank.
        """
        is_training = self.module.training
        self._construction.take_down(self._deepspeed, placements)
        del self._deepspeed, self.masters  # their memory, before that of the next is needed
        gc.collect()
        self._deepspeed = self._construction.build()
        self._deepspeed.train(is_training)
        self.masters = EngineMasters(self._deepspeed)
        self._watch.attach(self._deepspeed)

    def group_names(self) -> list[list[str]]:
        """Names of the parameters of each of the optimiser's groups."""
        return self._construction.group_names

    def set_counters(self, counters: Mapping[str, int]) -> None:
        """Set DeepSpeed's counters of steps and samples, by name."""
        for name, value in counters.items():
            setattr(self._deepspeed, name, value)

    @property
    def layers(self) -> dict[str, MoELayer]:
        """The model's `MoELayer`s by name."""
        return dict(self._layers)

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

    def save_checkpoint(self, folder: str | Path, client_state: Any = None, *, asynchronous: bool = False) -> Path:
        """Write everything that training needs to go on into `folder`/step-NNNNNNNN; its path.

        Weights, float32 masters, optimiser state, placements, controllers, records of the window, scheduler, counters
        and random number generators, under names that know neither ranks nor slots: any expert-parallel and
        data-parallel size, ZeRO stage and pool size can load it. client_state: this rank's own, of tensors, numbers,
        texts, lists and dictionaries. All ranks must see `folder`. A checkpoint is there as a whole, and
        `folder`/latest names it, or not at all. asynchronous: write in the background, after a copy to the host;
        `wait_for_checkpoint` says how it went; the next save and the next load log it.

        Only between `step()` and the next forward pass. Collective: every rank. Raises: CheckpointError on every rank
        if it cannot be written; training can go on.
        """
        self._check_between_steps("A checkpoint was asked for")
        self._check_no_shards("Checkpoints do")
        writer = self._writer
        self._wait_for_earlier(writer)
        attempt_together(self.masters.check_states, writer.group)
        snapshot = take_snapshot(self, client_state)
        attempt_together(snapshot.check_plain, writer.group)
        return writer.write(snapshot, Path(folder), asynchronous=asynchronous)

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is written.

        Collective: every rank. Raises: CheckpointError on every rank if it could not be written.
        """
        self._writer.wait()

    def load_checkpoint(self, folder: str | Path, step: int | None = None) -> tuple[Path, Any]:
        """Go on from a checkpoint in `folder`: the one after optimiser step `step`, by default the latest.

        Gives its path and this rank's client state; on another number of ranks than it was written with, rank 0's.
        The engine must be of the same model; ranks, ZeRO stage, dtype and pool size may differ. On as many ranks as
        before, training continues bit for bit. What is lost by another number of ranks: the order of the random
        number generators.

        Only between `step()` and the next forward pass. Collective: every rank. Raises: CheckpointError on every rank,
        naming the file or the parameter, for what is missing, damaged, of another model or of a newer format, and for
        pools that are too small.
        """
        self._check_between_steps("A checkpoint was asked for")
        self._check_no_shards("Checkpoints do")
        writer = self._writer
        self._wait_for_earlier(writer)
        checkpoint = attempt_together(
            lambda: open_checkpoint(find_checkpoint(Path(folder), step), dist.get_rank(), dist.get_world_size()),
            writer.group,
        )
        assert_same_on_all_ranks(
            "the checkpoint to load", {"path": checkpoint.path.name, "step": checkpoint.step}, writer.group
        )
        num_slots = self._num_slots()
        if self.adaptation.config is not None and self.adaptation.config.pool == "elastic":
            num_slots |= _pool_sizes(checkpoint.manifest["layers"], self._layers)
        restore(self, checkpoint, writer.group, num_slots)
        client_state = restore_own(self, checkpoint, writer.group)
        self.adaptation.events.clear()
        self._gradient_norm, self._num_left_out_in_a_row = None, 0
        return checkpoint.path, client_state

    def __getattr__(self, name: str) -> Any:
        if name in _NATIVE_CHECKPOINT_METHODS:
            raise CheckpointError(
                f"engine.{name} is DeepSpeed's own, whose checkpoints load rank 0's experts on all ranks without an "
                "error. Use engine.save_checkpoint and engine.load_checkpoint, or dynmoe_ds.save_model for weights."
            )
        if name == "_deepspeed":  # not set yet: copying or unpickling
            raise AttributeError(name)
        return getattr(self._deepspeed, name)

    @staticmethod
    def _wait_for_earlier(writer: CheckpointWriter) -> None:
        """Wait for a checkpoint in the background, whose failure must not keep this one from being tried."""
        try:
            writer.wait()
        except (CheckpointError, DivergenceError) as error:
            if dist.get_rank() == 0:
                _log.warning("The checkpoint before was not written: %s", error)

    def _check_between_steps(self, what: str) -> None:
        """Raises: CheckpointError in the middle of an optimiser step; every rank is at the same place."""
        if self._ledger.records() or self.records.of_step:
            raise CheckpointError(
                f"{what} in the middle of an optimiser step. Ask after the engine.step() that updates the weights, at "
                "the end of gradient accumulation, and before the next forward pass."
            )

    def _check_no_shards(self, what: str) -> None:
        """Raises: CheckpointError with tensor parallelism, where one rank's shard would be taken for the parameter."""
        if tp_size_of(self._construction.mpu) > 1:
            raise CheckpointError(
                f"{what} not work with tensor parallelism yet: a shard of a parameter would be taken for the whole."
            )

    def _tp_group(self) -> dist.ProcessGroup | None:
        mpu = self._construction.mpu
        return None if mpu is None else mpu.get_model_parallel_group()

    def _new_ledger(self) -> StepLedger:
        """A ledger for the forward passes until `backward`, which also notes what the rule will ask about this step."""
        wanted = self.adaptation.wanted_of(self.global_steps + 1)
        return StepLedger(num_kinds=len(self.token_kinds), watch=self._watch.note_layer, **wanted)

    def _check_kinds(self, token_kinds: Tensor | None) -> None:
        """Raises: RoutingError as `__call__`."""
        if token_kinds is None:
            return
        if not self.token_kinds:
            raise RoutingError(
                "A batch has token_kinds, but no kinds are declared. Name them in "
                "dynmoe_ds.initialize(token_kinds=(...)), or leave token_kinds out of the batch."
            )
        if not isinstance(token_kinds, Tensor) or token_kinds.dtype != torch.int64:
            found = token_kinds.dtype if isinstance(token_kinds, Tensor) else type(token_kinds).__name__
            raise RoutingError(f"token_kinds is {found} but must be an int64 tensor with one kind per token.")

    def _update(self) -> NonFinite | None:
        """Update the weights, or say what is not finite: then only DeepSpeed's gradients may be gone.

        Collective: every rank.
        """
        norm = None
        if self.zero_stage == 0:
            norm = clip_gradients(self.module, self._layers.values(), self._clipping, self._tp_group())
        step, counters = self.global_steps + 1, self._counters()
        found = self._watch.take(step, self.module, self.records.of_step, norm)
        if found is not None:
            return found
        self._deepspeed.step()
        if not self._deepspeed.was_step_applied():
            # From ZeRO-1 on DeepSpeed reduces the gradients, and leaves out an update whose norm is not finite.
            self.set_counters(counters)
            return norm_is_not_finite(step)
        if norm is None:
            norm = self._deepspeed.get_global_grad_norm()
        self._gradient_norm = None if norm is None else float(norm)
        return None

    def _take_in(self, records: dict[str, RoutingRecords]) -> None:
        """Keep the records of a step, and let the routers' controllers learn from them. Collective: every rank."""
        self.records.keep(self.global_steps, records)
        self._update_routers(records)

    def _leave_out(self, found: NonFinite) -> None:
        """End a step without its update, or the training. Raises: NonFiniteError as `step`. Collective: every rank."""
        self.adaptation.sampler.clear()  # it holds tokens of this step only
        advice = self._stop_advice(found)
        if advice is not None:
            drop_gradients(self._deepspeed)
            self.set_counters(self._first_counters)
            self._first_counters = {}
            raise NonFiniteError(f"{found.text} Nothing was updated. {advice}")
        leave_out_update(self._deepspeed)
        self._gradient_norm = None
        self._num_left_out_in_a_row += 1
        if dist.get_rank() == 0:
            _log.warning("%s The update is left out, as %d before.", found.text, self.skipped_steps - 1)

    def _stop_advice(self, found: NonFinite) -> str | None:
        """Why the training must stop now, and what to do; None if the update can be left out."""
        if found.bad_weights:
            return "Weights do not become finite again: go back to a checkpoint."
        if self.on_non_finite == "stop":
            return (
                "Look at that rank's batch, that layer and the learning rate; with on_non_finite skip_step the updates "
                "of such steps are left out."
            )
        if self._num_left_out_in_a_row >= MAX_LEFT_OUT_IN_A_ROW:
            return (
                f"The updates of the {MAX_LEFT_OUT_IN_A_ROW} steps before were left out already. Go back to a "
                "checkpoint, and look at the data and the learning rate."
            )
        return None

    def _counters(self) -> dict[str, int]:
        return {name: getattr(self._deepspeed, name) for name in COUNTERS}

    def _num_slots(self) -> dict[str, int]:
        return {name: layer.num_slots for name, layer in self._layers.items()}

    def _update_routers(self, records: dict[str, RoutingRecords]) -> None:
        """Let the routers' controllers take in an optimiser step. Collective if any router has one: every rank."""
        controlled = {name: layer for name, layer in self._layers.items() if layer.router.has_controller}
        if controlled:
            reduced = self.records.reduce(records, controlled)
            update_routers(
                {name: layer.router for name, layer in controlled.items()},
                reduced,
                {name: layer.active for name, layer in controlled.items()},
            )


def _group_on_host() -> dist.ProcessGroup | None:
    """A group of all ranks that works on host memory; None for the default one. Collective: every rank."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=group_timeout())


def _pool_sizes(described: Mapping[str, Any], layers: Mapping[str, MoELayer]) -> dict[str, int]:
    """The sizes of a checkpoint's pools, or a little more where the ranks of here could not share them."""
    return {
        name: -(-len(described[name]["expert_ids"]) // layer.ep_size) * layer.ep_size
        for name, layer in layers.items()
        if name in described
    }
