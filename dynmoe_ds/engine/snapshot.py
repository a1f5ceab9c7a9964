"""What a checkpoint holds of an engine, under names that know neither ranks nor slots nor ZeRO stages, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_ds.adaptation.surgery import WEIGHT, full_shape
from dynmoe_ds.checkpoint.entries import Entry, entries
from dynmoe_ds.checkpoint.store import Snapshot
from dynmoe_ds.distributed import attempt_together
from dynmoe_ds.engine.gathering import whole
from dynmoe_ds.engine.masters import EngineMasters
from dynmoe_ds.engine.plain_records import plain_records, records_of, summed
from dynmoe_ds.engine.random_state import restore_rng, rng_state
from dynmoe_ds.engine.seam import sharing_group
from dynmoe_ds.errors import CheckpointError
from dynmoe_ds.moe import MoELayer, Placement

if TYPE_CHECKING:
    from dynmoe_ds.engine.engine import Engine


class Restorable(Protocol):
    """A checkpoint, on the disk or in memory. path: what errors call it."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> dict[str, Any]: ...

    def check_names(self, expected: Mapping[str, torch.Size]) -> None:
        """Raises: CheckpointError unless it has tensors of these names and shapes, and no others."""

    def read_tensors(self, wanted: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
        """Fill tensors by name. Collective: every rank of `group`."""

    def read_shared(self) -> dict[str, Any]:
        """What is equal on all ranks."""

    def read_own(self, rank: int) -> dict[str, Any]:
        """What is the rank's own."""


COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""DeepSpeed's counters of steps and samples."""
_BYTES_AT_ONCE = 2**30
_ADAMS = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}


def take_snapshot(engine: Engine, client_state: Any) -> Snapshot:
    """The state of `engine` between two optimiser steps, on the host; training may change the engine's own meanwhile.

    Collective: every rank.
    """
    masters, layers = engine.masters, engine.layers
    experts = _experts(engine)
    state = {
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "optimizer_steps": _optimizer_steps(engine),
        "learning_rates": {
            name: float(group["lr"])
            for group, names in zip(engine.optimizer.param_groups, engine.group_names(), strict=True)
            for name in names
        },
        "scheduler": copy.deepcopy(engine.lr_scheduler.state_dict()) if engine.lr_scheduler is not None else None,
        "layers_known_full": sorted(engine.adaptation.layers_known_full),
    }
    return Snapshot(
        step=engine.global_steps,
        tensors=_own_tensors(engine.module, masters),
        shared=state,
        own={
            "rng": rng_state(),
            "window": plain_records(engine.records.window.records() if engine.records.window else {}, layers),
            "untaken": plain_records(engine.records.untaken(), layers),
            "client_state": copy.deepcopy(client_state),
        },
        described={
            "optimizer": masters.optimizer_name(),
            "state_names": list(masters.state_names()),
            "layers": {name: _describe(layer) | {"experts": experts[name]} for name, layer in layers.items()},
            "layout": {
                "world_size": dist.get_world_size(),
                "zero_stage": engine.zero_stage,
                "dtype": f"{next(engine.module.parameters()).dtype}".removeprefix("torch."),
            },
        },
    )


def restore(
    engine: Engine, checkpoint: Restorable, group: dist.ProcessGroup | None, num_slots: Mapping[str, int]
) -> None:
    """Bring what all ranks share of `engine` to the state of a checkpoint of the same model.

    num_slots: the size of each layer's pool from now on; where it is another one, the engine is rebuilt.
    Collective: every rank. Raises: CheckpointError on every rank; weights may be half read after one about a file.
    """
    layers = engine.layers
    shared = attempt_together(checkpoint.read_shared, group)
    described: Mapping[str, Any] = checkpoint.manifest["layers"]
    if described.keys() != layers.keys():
        raise CheckpointError(
            f"{checkpoint.path} is of another model: its MoE layers are {', '.join(described) or 'none'}, but here "
            f"they are {', '.join(layers) or 'none'}."
        )
    placements = {
        name: _fitted(name, described[name], num_slots[name], layer.ep_size, checkpoint)
        for name, layer in layers.items()
    }
    state_names = tuple(checkpoint.manifest["state_names"])
    _check_layers(described, layers, checkpoint)
    _check_optimizer(engine.masters, checkpoint)
    checkpoint.check_names(_sizes(engine, placements, state_names))
    if any(layer.num_slots != num_slots[name] for name, layer in layers.items()):
        engine.rebuild(placements)
    engine.masters.make_states(state_names)
    for name, layer in layers.items():
        layer.placement, layer.seed = placements[name], int(described[name]["seed"])
        engine.adaptation.lives.restore(name, described[name]["experts"])
    for part in _in_parts(engine.module, engine.masters, state_names):
        wanted = {name: tensor for loading in part for name, tensor in loading.wanted.items()}
        checkpoint.read_tensors(wanted, group)
        for loading in part:
            loading.store(engine.masters)
    _restore_steps(engine, shared)
    engine.adaptation.layers_known_full = set(shared["layers_known_full"])


def restore_own(engine: Engine, checkpoint: Restorable, group: dist.ProcessGroup | None) -> Any:
    """Bring random number generators and records to the state of a checkpoint, after `restore`; the client state.

    Each rank gets back its own client state if there are as many ranks as there were, else rank 0's.
    Collective: every rank. Raises: CheckpointError on every rank for a file that cannot be read.
    """
    layers = engine.layers
    num_ranks, rank = int(checkpoint.manifest["layout"]["world_size"]), dist.get_rank()
    is_same_size = num_ranks == dist.get_world_size()
    # Sums over ranks are all that is ever asked of records: on another number of ranks the first takes those of all.
    others = range(num_ranks) if rank == 0 and not is_same_size else ()
    own, everyone = attempt_together(
        lambda: (checkpoint.read_own(rank if is_same_size else 0), [checkpoint.read_own(at) for at in others]), group
    )
    if is_same_size:
        restore_rng(own["rng"])
        window, untaken = own["window"], own["untaken"]
    else:
        window, untaken = (summed([of[part] for of in everyone]) for part in ("window", "untaken"))
    engine.records.restore(
        window=records_of(window, layers),
        untaken=records_of(untaken, layers),
        last_loads=_last_loads(checkpoint.manifest["layers"]),
    )
    return own["client_state"]


def _sizes(engine: Engine, placements: Mapping[str, Placement], state_names: tuple[str, ...]) -> dict[str, torch.Size]:
    """The shapes of all tensors of a checkpoint of this model with these placements, by name."""
    sizes: dict[str, torch.Size] = {}
    for entry in entries(engine.module, placements):
        kinds = (WEIGHT, *state_names) if engine.masters.covers(entry.tensor) else (WEIGHT,)
        shape = full_shape(entry.tensor)  # type: ignore[arg-type]
        sizes |= {_name(n, kind): shape if entry.slots is None else shape[1:] for n in entry.names() for kind in kinds}
    return sizes


def _check_layers(described: Mapping[str, Any], layers: Mapping[str, MoELayer], checkpoint: Restorable) -> None:
    """Raises: CheckpointError for layers with other routers or experts, whose tensors may have the same names."""
    for name, layer in layers.items():
        here = _describe(layer)
        for key in ("router", "expert"):
            if described[name][key] != here[key]:
                raise CheckpointError(
                    f"{checkpoint.path} is of another model: the {key} of {name} is {described[name][key]} there, but "
                    f"{here[key]} here."
                )


def _last_loads(described: Mapping[str, Any]) -> dict[str, dict[int, int]]:
    """The tokens of the last optimiser step by layer and expert id, as `_experts` noted them."""
    loads = {
        name: {int(id_): life["last_load"] for id_, life in of_layer["experts"].items()}
        for name, of_layer in described.items()
    }
    return {name: {id_: load for id_, load in of.items() if load is not None} for name, of in loads.items()}


def _check_optimizer(masters: EngineMasters, checkpoint: Restorable) -> None:
    """Implementations of Adam keep the same state under the same names; other optimisers must be equal."""
    written, here = (f"{name}" for name in (checkpoint.manifest["optimizer"], masters.optimizer_name()))
    if written != here and not {written, here} <= _ADAMS:
        raise CheckpointError(
            f"{checkpoint.path} holds the state of {written}, but this engine's optimiser is {here}. Use the optimiser "
            "that it was written with."
        )


# Tensors


def _own_tensors(module: nn.Module, masters: EngineMasters) -> dict[str, Tensor]:
    """This rank's share of all weights, masters and moments, on the host. Collective: every rank."""
    found: dict[str, Tensor] = {}
    rank = dist.get_rank()
    for index, entry in enumerate(entries(module)):
        holders = _holders(entry)
        is_writer = holders[index % len(holders)] == rank
        for kind, value in _read(entry, masters).items():
            if is_writer:
                rows = _local_rows(entry)
                parts = {entry.key: value} if rows is None else {name: value[row] for name, row in rows.items()}
                found |= {_name(name, kind): part.to("cpu", copy=True) for name, part in parts.items()}
    return found


def _read(entry: Entry, masters: EngineMasters) -> dict[str, Tensor]:
    """By kind, whole. Collective: the ranks that share the entry."""
    tensor = entry.tensor
    if masters.covers(tensor):
        assert isinstance(tensor, nn.Parameter)
        shape = full_shape(tensor)
        state = masters.read(tensor, 0, shape[0] if shape else 1)
        return {kind: value.view(shape) for kind, value in state.items()}
    with whole(tensor) as value:
        return {WEIGHT: value.clone()}


class _Loading:
    """One entry on its way from a checkpoint. wanted: tensors on the host by name, to be filled."""

    def __init__(self, entry: Entry, kinds: tuple[str, ...], dtype: torch.dtype) -> None:
        self.entry, self.kinds, self.dtype = entry, kinds, dtype
        self.shape = full_shape(entry.tensor)  # type: ignore[arg-type]
        self.rows = _local_rows(entry)
        self.wanted: dict[str, Tensor] = {}
        for kind in kinds:
            shape = self.shape if self.rows is None else self.shape[1:]
            for name in (entry.key,) if self.rows is None else self.rows:
                self.wanted[_name(name, kind)] = torch.empty(shape, dtype=dtype)

    @torch.no_grad()
    def store(self, masters: EngineMasters) -> None:
        """Put what was read where it belongs; free slots get zeros."""
        tensor = self.entry.tensor
        values = {kind: self._whole(kind).to(tensor.device) for kind in self.kinds}
        if masters.covers(tensor):
            num_rows = self.shape[0] if self.shape else 1
            masters.write(tensor, 0, num_rows, values)  # type: ignore[arg-type]
        elif isinstance(tensor, nn.Parameter):
            masters.write_frozen(tensor, values[WEIGHT])
        else:
            tensor.copy_(values[WEIGHT])

    def _whole(self, kind: str) -> Tensor:
        if self.rows is None:
            return self.wanted[_name(self.entry.key, kind)]
        value = torch.zeros(self.shape, dtype=self.dtype)
        for name, row in self.rows.items():
            value[row] = self.wanted[_name(name, kind)]
        return value


def _in_parts(module: nn.Module, masters: EngineMasters, state_names: tuple[str, ...]) -> Iterator[list[_Loading]]:
    """All entries in parts of bounded size, as many on every rank: experts are of equal shapes there."""
    part: list[_Loading] = []
    size = 0
    for entry in entries(module):
        is_trained = masters.covers(entry.tensor)
        kinds = (WEIGHT, *state_names) if is_trained else (WEIGHT,)
        loading = _Loading(entry, kinds, torch.float32 if is_trained else entry.tensor.dtype)
        part.append(loading)
        # The size of the whole pool, not of what is live here: all ranks must come to the same parts.
        size += full_shape(entry.tensor).numel() * loading.dtype.itemsize * len(kinds)  # type: ignore[arg-type]
        if size > _BYTES_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def _holders(entry: Entry) -> list[int]:
    """The ranks that hold the same rows of an entry."""
    if entry.layer is None:
        return list(range(dist.get_world_size()))
    return dist.get_process_group_ranks(sharing_group(entry.tensor))  # type: ignore[arg-type]


def _local_rows(entry: Entry) -> dict[str, int] | None:
    """This rank's row of every name that has one here; None for an entry that stands there whole."""
    if entry.slots is None:
        return None
    if entry.layer is None:
        return dict(entry.slots)
    local = entry.layer.local_slots
    return {name: slot - local.start for name, slot in entry.slots.items() if slot in local}


def _name(name: str, kind: str) -> str:
    return f"{name}/{kind}"


# Placements


def _describe(layer: MoELayer) -> dict[str, Any]:
    return {
        "expert_ids": list(layer.placement.expert_ids),
        "next_expert_id": layer.placement.next_id,
        "ep_size": layer.ep_size,
        "hidden_size": layer.hidden_size,
        "ffn_hidden_size": layer.ffn_hidden_size,
        "expert": layer.expert_kind,
        "router": type(layer.router.config).__name__,
        "seed": layer.seed,
    }


def _experts(engine: Engine) -> dict[str, dict[str, Any]]:
    """Births, deaths and the load of the last optimiser step by layer and expert id. Collective: every rank."""
    loads = engine.last_loads()
    return {
        name: {
            f"{expert_id}": life | {"last_load": loads.get(name, {}).get(expert_id)}
            for expert_id, life in engine.adaptation.lives.of(name).items()
        }
        for name in engine.layers
    }


def _fitted(name: str, described: Mapping[str, Any], num_slots: int, ep_size: int, checkpoint: Restorable) -> Placement:
    """The checkpoint's experts in a pool: in their slots if it is of the same size, else near them."""
    ids: list[int | None] = described["expert_ids"]
    num_live = len(ids) - ids.count(None)
    if num_live > num_slots:
        raise CheckpointError(
            f"{checkpoint.path} has {num_live} experts in {name}, but its pool has {num_slots} slots. Build the model "
            f"with num_slots {num_live} or more."
        )
    return Placement(expert_ids=tuple(ids), next_id=int(described["next_expert_id"]), ep_size=ep_size).resized(
        num_slots
    )


# Counters of the engine and its optimiser


def _optimizer_steps(engine: Engine) -> dict[str, float]:
    """Adam's step of every trained parameter. Collective: every rank."""
    own = {
        name: step
        for name, param in engine.module.named_parameters()
        if (step := engine.masters.step_of(param)) is not None
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    merged: dict[str, float] = {}
    for of_rank in everyone:
        for name, step in of_rank.items():
            merged[name] = max(step, merged.get(name, step))
    return merged


def _restore_steps(engine: Engine, shared: Mapping[str, Any]) -> None:
    for name, param in engine.module.named_parameters():
        if name in shared["optimizer_steps"]:
            engine.masters.set_step(param, shared["optimizer_steps"][name])
    engine.set_counters(shared["counters"])
    for group, names in zip(engine.optimizer.param_groups, engine.group_names(), strict=True):
        # By parameter, since experts are in groups of their own below ZeRO-3 only. All of a group have the same.
        if names:
            group["lr"] = shared["learning_rates"][names[0]]
    if engine.lr_scheduler is not None and shared["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(shared["scheduler"])
