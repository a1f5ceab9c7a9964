"""Surgery: carrying a plan out on weights, float32 masters and optimiser moments, on all ranks or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_ds.adaptation.config import SEEDINGS, AdaptationConfig
from dynmoe_ds.adaptation.controller import nearest_expert
from dynmoe_ds.adaptation.plan import Grow, Move, Plan, Prune
from dynmoe_ds.distributed import assert_same_on_all_ranks
from dynmoe_ds.errors import PlacementError, SurgeryError
from dynmoe_ds.experts import seeded_generator
from dynmoe_ds.moe import MoELayer, Placement

WEIGHT = "weight"
SECOND_MOMENT = "exp_avg_sq"
State = dict[str, Tensor]
"""A parameter's rows by what they are: `weight` (the float32 master) and the optimiser's entries, such as `exp_avg`."""


class Masters(Protocol):
    """Rows of float32 masters and of the optimiser's state, along the first dimension of a parameter."""

    def state_names(self) -> tuple[str, ...]:
        """The optimiser's entries per element, equal on all ranks; for Adam `exp_avg` and `exp_avg_sq`."""

    def read(self, param: nn.Parameter, start: int, stop: int) -> State:
        """Rows [start, stop) in float32. Collective: the ranks that share the parameter's optimiser state."""

    def write(self, param: nn.Parameter, start: int, stop: int, state: State) -> None:
        """Set rows of master, state and model weight. Local, but every sharing rank must give the same values."""


def operate(plan: Plan, layers: Mapping[str, MoELayer], masters: Masters, config: AdaptationConfig | None) -> Plan:
    """Carry out a plan; give it with the parents that `copy_nearest` chose.

    Collective: every rank, with the same plan (compared first). config: how new experts are seeded; may be None for a
    plan without `Grow`. Raises: DivergenceError on every rank if plans differ; PlacementError if the plan contradicts
    the placements; SurgeryError for an expert that cannot be seeded as it says. All before anything is changed.
    """
    assert_same_on_all_ranks(
        "the plan", plan.fingerprint(), advice="Give all ranks the same plan: nothing was changed."
    )
    _check(plan, layers, config)
    done: list[Prune | Grow | Move] = []
    with torch.no_grad():
        for item in plan.items:
            surgeon = _Surgeon(layers[item.layer], masters)
            if isinstance(item, Grow):
                assert config is not None  # checked above
                item = surgeon.grow(item, config)
            elif isinstance(item, Move):
                surgeon.move(item)
            else:
                surgeon.clear(layers[item.layer].placement.slot_of(item.expert_id))
            layers[item.layer].placement = item.apply(layers[item.layer].placement)
            done.append(item)
    pools = {name: layer.placement.expert_ids for name, layer in layers.items()}
    assert_same_on_all_ranks("the pools after surgery", pools, advice="This is a fault of dynmoe_ds: please report it.")
    return Plan(items=tuple(done))


def _check(plan: Plan, layers: Mapping[str, MoELayer], config: AdaptationConfig | None) -> None:
    """Raises: PlacementError, SurgeryError as `operate`."""
    placements = {name: layer.placement for name, layer in layers.items()}
    for item in plan.items:
        if item.layer not in layers:
            raise PlacementError(f"There is no layer called {item.layer!r}. Layers: {', '.join(layers)}.")
        if isinstance(item, Grow):
            _check_seeding(item, layers[item.layer], placements[item.layer], config)
        placements[item.layer] = item.apply(placements[item.layer])


def _check_seeding(item: Grow, layer: MoELayer, placement: Placement, config: AdaptationConfig | None) -> None:
    where = f"{item.layer}, expert {item.expert_id}"
    if config is None:
        raise SurgeryError(f"{where}: a plan that grows experts needs an AdaptationConfig. Give initialize one.")
    if item.seeding not in SEEDINGS:
        raise SurgeryError(f"{where}: seeding is {item.seeding!r}. Use one of {', '.join(SEEDINGS)}.")
    if item.seeding == "copy_most_loaded" and item.parent_id is None:
        raise SurgeryError(f"{where}: seeding is copy_most_loaded but parent_id is None. Name the parent.")
    if item.parent_id is not None:
        placement.slot_of(item.parent_id)
    if item.gate_row.shape != (layer.hidden_size,):
        raise SurgeryError(f"{where}: gate_row has shape {list(item.gate_row.shape)}, not [{layer.hidden_size}].")


class _Surgeon:
    """The hands on one layer."""

    def __init__(self, layer: MoELayer, masters: Masters) -> None:
        self.layer, self.masters = layer, masters
        self.placement = layer.placement
        self.expert_params = dict(layer.experts.named_parameters())
        self.router_params = layer.router.slot_parameters()
        self.router_buffers = [layer.router.get_buffer(name) for name in layer.router.slot_buffers]

    def grow(self, item: Grow, config: AdaptationConfig) -> Grow:
        """Fill a free slot: router rows on all ranks, expert rows on the rank that holds the slot."""
        if item.seeding == "copy_nearest" and item.parent_id is None:
            gates = self.masters.read(self.layer.router.weight, 0, self.layer.num_slots)[WEIGHT]
            item = item.with_parent(nearest_expert(item.gate_row, gates, self.placement))
        new = self._seed_expert(item, config)
        self._write_expert(item.slot, new)
        for name, param in self.router_params.items():
            rows = self.masters.read(param, 0, self.layer.num_slots)
            self.masters.write(param, item.slot, item.slot + 1, self._new_router_row(name, rows, item, config))
        for buffer in self.router_buffers:
            buffer[item.slot] = buffer[list(self.placement.slots_by_id.values())].mean()
        return item

    def move(self, item: Move) -> None:
        """Carry an expert with its moments to another slot, on whatever rank."""
        from_slot = self.placement.slot_of(item.expert_id)
        self._write_expert(item.to_slot, self._read_expert(from_slot))
        for param in self.router_params.values():
            row = self.masters.read(param, from_slot, from_slot + 1)
            self.masters.write(param, item.to_slot, item.to_slot + 1, row)
        for buffer in self.router_buffers:
            buffer[item.to_slot] = buffer[from_slot]
        self.clear(from_slot)

    def clear(self, slot: int) -> None:
        """Zero a slot's weights and moments everywhere, so that the optimiser leaves it at rest."""
        self._write_expert(slot, {name: self._zeros(param) for name, param in self.expert_params.items()})
        for param in self.router_params.values():
            self.masters.write(param, slot, slot + 1, self._zeros(param))
        for buffer in self.router_buffers:
            buffer[slot] = 0

    def _seed_expert(self, item: Grow, config: AdaptationConfig) -> dict[str, State]:
        if item.parent_id is not None:
            parent = self._read_expert(self.placement.slot_of(item.parent_id))
            for name, state in parent.items():
                noise = torch.randn(
                    state[WEIGHT].shape, generator=seeded_generator(self.layer.seed, item.expert_id, name, "noise")
                )
                scale = config.noise * state[WEIGHT].std(correction=0)
                state[WEIGHT] = state[WEIGHT] + scale * noise.to(state[WEIGHT].device)
            return parent
        mean = self._mean_expert()
        if item.seeding == "mean":
            return mean
        fresh = self.layer.experts.initial(self.layer.seed, item.expert_id)
        for name, state in mean.items():
            # The second moment of the live experts keeps the first update near the learning rate: with 0 it would be
            # (1 - beta1) / sqrt(1 - beta2) of it, about three times, since Adam's step count does not start again.
            for key in state:
                if key != SECOND_MOMENT:
                    state[key] = torch.zeros_like(state[key])
            state[WEIGHT] = fresh[name][None].to(state[WEIGHT])
        return mean

    def _new_router_row(self, name: str, rows: State, item: Grow, config: AdaptationConfig) -> State:
        slots = list(self.placement.slots_by_id.values())
        mean_of_live = {key: value[slots].mean(0, keepdim=True) for key, value in rows.items()}
        row = {key: torch.zeros_like(value) for key, value in mean_of_live.items()}
        if SECOND_MOMENT in row:
            row[SECOND_MOMENT] = mean_of_live[SECOND_MOMENT]
        if name == "weight":
            row[WEIGHT] = item.gate_row[None].to(rows[WEIGHT])
        elif name == "threshold" and config.new_threshold == "mean_of_live":
            row[WEIGHT] = mean_of_live[WEIGHT]
        return row

    def _read_expert(self, slot: int) -> dict[str, State]:
        """One expert on every rank of the expert-parallel group. Collective: that group, and the holder's replicas."""
        local = slot - self.layer.local_slots.start
        state = {
            name: self.masters.read(param, local, local + 1) if slot in self.layer.local_slots else self._zeros(param)
            for name, param in self.expert_params.items()
        }
        group = self.layer.ep_group
        if group is not None:
            source = dist.get_global_rank(group, self.placement.rank_of(slot))
            self._on_each(state, lambda tensor: dist.broadcast(tensor, source, group=group))
        return state

    def _mean_expert(self) -> dict[str, State]:
        """Mean of the live experts, weights and state. Collective: the expert-parallel group."""
        start = self.layer.local_slots.start
        own = [slot - start for slot in self.placement.slots_by_id.values() if slot in self.layer.local_slots]
        mean = {}
        for name, param in self.expert_params.items():
            # Every replica reads, also without a live expert here, since reading is collective over replicas.
            rows = self.masters.read(param, 0, len(self.layer.local_slots))
            mean[name] = {key: value[own].sum(0, keepdim=True) for key, value in rows.items()}
        group = self.layer.ep_group
        if group is not None:
            self._on_each(mean, lambda tensor: dist.all_reduce(tensor, group=group))
        self._on_each(mean, lambda tensor: tensor.div_(len(self.placement.live_ids)))
        return mean

    def _write_expert(self, slot: int, state: Mapping[str, State]) -> None:
        if slot in self.layer.local_slots:
            local = slot - self.layer.local_slots.start
            for name, param in self.expert_params.items():
                self.masters.write(param, local, local + 1, state[name])

    def _zeros(self, param: nn.Parameter) -> State:
        """A row of zeros for weight and state, float32."""
        shape = (1, *full_shape(param)[1:])
        return {key: torch.zeros(shape, device=param.device) for key in (WEIGHT, *self.masters.state_names())}

    @staticmethod
    def _on_each(state: Mapping[str, State], act: Callable[[Tensor], object]) -> None:
        for entries in state.values():
            for tensor in entries.values():
                act(tensor)


def full_shape(param: nn.Parameter) -> torch.Size:
    """A parameter's shape, also while ZeRO-3 holds it in parts."""
    return getattr(param, "ds_shape", param.shape)
