"""Surgery: carrying a plan out on weights, float32 masters and optimiser moments, on all ranks or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_ds.adaptation.config import SEEDINGS, AdaptationConfig
from dynmoe_ds.adaptation.controller import nearest_expert
from dynmoe_ds.adaptation.plan import Grow, Move, Plan, PlanItem, Split
from dynmoe_ds.adaptation.splitting import redrawn, split_direction, split_rows
from dynmoe_ds.distributed import assert_same_on_all_ranks, take_from_first_rank
from dynmoe_ds.errors import PlacementError, SurgeryError
from dynmoe_ds.experts import seeded_generator
from dynmoe_ds.moe import MoELayer, Placement, TokenSampler
from dynmoe_ds.routing.splitting import SplitExpert

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


def operate(
    plan: Plan,
    layers: Mapping[str, MoELayer],
    masters: Masters,
    config: AdaptationConfig | None,
    sampler: TokenSampler | None = None,
) -> Plan:
    """Carry out a plan; give it with the parents that `copy_nearest` chose.

    config: how new experts are seeded; may be None for a plan that adds none. sampler: the tokens that experts are
    split by, taken with the placements that the plan starts from; without one the halves part in a random direction
    and keep the parent's thresholds.

    Collective: every rank, with the same plan (compared first). Raises: DivergenceError on every rank if plans differ;
    PlacementError if the plan contradicts the placements; SurgeryError for an expert that cannot be seeded or split as
    it says. All before anything is changed.
    """
    assert_same_on_all_ranks(
        "the plan", plan.fingerprint(), advice="Give all ranks the same plan: nothing was changed."
    )
    _check(plan, layers, config)
    done: list[PlanItem] = []
    samples = _Samples(layers, sampler)
    with torch.no_grad():
        for item in plan.items:
            layer = layers[item.layer]
            surgeon = _Surgeon(layer, masters)
            if isinstance(item, Grow):
                assert config is not None  # checked above
                item = surgeon.grow(item, config)
            elif isinstance(item, Split):
                assert config is not None  # checked above
                surgeon.split(item, config, *samples.of_parent(item))
            elif isinstance(item, Move):
                surgeon.move(item)
            else:
                surgeon.clear(layer.placement.slot_of(item.expert_id))
            layer.placement = item.apply(layer.placement)
            done.append(item)
    pools = {name: layer.placement.expert_ids for name, layer in layers.items()}
    assert_same_on_all_ranks("the pools after surgery", pools, advice="This is a fault of dynmoe_ds: please report it.")
    return Plan(items=tuple(done))


def _check(plan: Plan, layers: Mapping[str, MoELayer], config: AdaptationConfig | None) -> None:
    """Raises: PlacementError, SurgeryError as `operate`."""
    placements = {name: layer.placement for name, layer in layers.items()}
    made: set[tuple[str, int]] = set()  # experts of a layer that the plan has split or added so far
    for item in plan.items:
        if item.layer not in layers:
            raise PlacementError(f"There is no layer called {item.layer!r}. Layers: {', '.join(layers)}.")
        if isinstance(item, Grow | Split) and config is None:
            raise SurgeryError(
                f"{item.layer}, expert {item.expert_id}: a plan that grows experts needs an AdaptationConfig. Give "
                "initialize one."
            )
        if isinstance(item, Grow):
            _check_seeding(item, layers[item.layer], placements[item.layer])
        if isinstance(item, Split):
            if (item.layer, item.parent_id) in made:
                raise SurgeryError(
                    f"{item.layer}, expert {item.expert_id}: its parent {item.parent_id} was split or added earlier in "
                    "this plan, and nobody knows its tokens yet. Split it in a later plan."
                )
            made.add((item.layer, item.parent_id))
        if isinstance(item, Grow | Split):
            made.add((item.layer, item.expert_id))
        placements[item.layer] = item.apply(placements[item.layer])


def _check_seeding(item: Grow, layer: MoELayer, placement: Placement) -> None:
    where = f"{item.layer}, expert {item.expert_id}"
    if item.seeding not in SEEDINGS:
        raise SurgeryError(f"{where}: seeding is {item.seeding!r}. Use one of {', '.join(SEEDINGS)}.")
    if item.seeding == "copy_most_loaded" and item.parent_id is None:
        raise SurgeryError(f"{where}: seeding is copy_most_loaded but parent_id is None. Name the parent.")
    if item.parent_id is not None:
        placement.slot_of(item.parent_id)
    if item.gate_row.shape != (layer.hidden_size,):
        raise SurgeryError(f"{where}: gate_row has shape {list(item.gate_row.shape)}, not [{layer.hidden_size}].")


class _Samples:
    """The tokens that experts are split by: gathered at the first split of a layer and kept for one layer at a time."""

    def __init__(self, layers: Mapping[str, MoELayer], sampler: TokenSampler | None) -> None:
        self._layers, self._sampler = layers, sampler
        self._placements = {name: layer.placement for name, layer in layers.items()}
        self._name: str | None = None
        self._sample = (torch.empty(0), torch.empty(0))

    def of_parent(self, item: Split) -> tuple[Tensor, Tensor]:
        """hidden [N, D] and which of them chose the parent [N] bool; N is 0 without a sample.

        Collective: every rank.
        """
        layer = self._layers[item.layer]
        if self._sampler is None:
            none = layer.active.new_zeros(0)
            return none.new_zeros(0, layer.hidden_size, dtype=torch.float32), none
        if self._name != item.layer:
            self._name, self._sample = item.layer, self._sampler.gather(layer)
        hidden, mask = self._sample
        return hidden, mask[:, self._placements[item.layer].slot_of(item.parent_id)]


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

    def split(self, item: Split, config: AdaptationConfig, hidden: Tensor, chose_parent: Tensor) -> None:
        """Copy an expert into a free slot and part the gate rows of the two; they are split by hidden [N, D].

        The FFN's moments are copied. Gate rows and what else the router has for the two start with a first moment of 0
        and the parent's second moment: with 0 their first update would be about three times the learning rate.
        Every rank takes the router's values of rank 0, so that no rounding can make replicas differ.
        """
        parent, child = self.placement.slot_of(item.parent_id), item.slot
        expert = self._read_expert(parent)
        self._reset_units(expert, item.expert_id, config.split_reset_share)
        self._write_expert(child, expert)

        router, num_slots = self.layer.router, self.layer.num_slots
        states = {name: self.masters.read(param, 0, num_slots) for name, param in self.router_params.items()}
        values = {name: state[WEIGHT].clone() for name, state in states.items()}
        values |= {name: router.get_buffer(name).clone() for name in router.slot_buffers}
        for value in values.values():
            value[child] = value[parent]
        row = values["weight"][parent].double()
        generator = seeded_generator(self.layer.seed, item.expert_id, "split")
        rows = split_rows(row, split_direction(hidden[chose_parent], row, generator), config.split_separation)
        values["weight"][[parent, child]] = rows.to(values["weight"])
        active = self.layer.active.clone()
        active[child] = True
        values |= router.split(
            values,
            SplitExpert(parent=parent, child=child, active=active, hidden=hidden, chose_parent=chose_parent),
        )
        for name, value in values.items():
            value = value.contiguous()
            take_from_first_rank(value)
            if name in states:
                self._write_halves(self.router_params[name], states[name] | {WEIGHT: value}, parent, child)
            else:
                router.get_buffer(name).copy_(value)

    def _write_halves(self, param: nn.Parameter, state: State, parent: int, child: int) -> None:
        """Write all rows of a router's parameter; those of parent and child with fresh moments."""
        for key, rows in state.items():
            if key == SECOND_MOMENT:
                rows[child] = rows[parent]
            elif key != WEIGHT:
                rows[[parent, child]] = 0.0
        self.masters.write(param, 0, self.layer.num_slots, state)

    def _reset_units(self, expert: Mapping[str, State], expert_id: int, share: float) -> None:
        """Let a share of an expert's hidden units start anew, without a first moment and with a mean second moment."""
        experts = self.layer.experts
        num_units = round(share * experts.ffn_hidden_size)
        if num_units == 0:
            return
        generator = seeded_generator(self.layer.seed, expert_id, "reset")
        units = torch.randperm(experts.ffn_hidden_size, generator=generator)[:num_units].to(self.layer.active.device)
        for name, dim in experts.unit_dims.items():
            state = expert[name]
            for key, value in state.items():
                if key == WEIGHT:
                    state[key] = redrawn(value, units, dim, generator)
                else:
                    mean = value.mean(dim, keepdim=True) if key == SECOND_MOMENT else torch.zeros_like(value)
                    state[key] = value.index_copy(dim, units, mean.expand_as(value).index_select(dim, units))

    def move(self, item: Move) -> None:
        """Carry an expert with its moments to another slot, on whatever rank, and the one there to its old slot."""
        from_slot, to_slot = self.placement.slot_of(item.expert_id), item.to_slot
        if item.exchange_with is None:
            self._write_expert(to_slot, self._read_expert(from_slot))
            for param in self.router_params.values():
                self.masters.write(param, to_slot, to_slot + 1, self.masters.read(param, from_slot, from_slot + 1))
            for buffer in self.router_buffers:
                buffer[to_slot] = buffer[from_slot]
            self.clear(from_slot)
            return
        mover, other = self._read_expert(from_slot), self._read_expert(to_slot)
        self._write_expert(to_slot, mover)
        self._write_expert(from_slot, other)
        for param in self.router_params.values():
            row, other_row = (self.masters.read(param, slot, slot + 1) for slot in (from_slot, to_slot))
            self.masters.write(param, to_slot, to_slot + 1, row)
            self.masters.write(param, from_slot, from_slot + 1, other_row)
        for buffer in self.router_buffers:
            buffer[[from_slot, to_slot]] = buffer[[to_slot, from_slot]]

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
