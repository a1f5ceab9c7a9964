"""Rows of float32 masters and optimiser moments, at every ZeRO stage of an unmodified DeepSpeed.

DeepSpeed's own `safe_get_*` and `safe_set_*` fail on experts at ZeRO-1 and 2, do nothing at ZeRO-0, hang at 4 ranks
before the first step, and leave the model's own copy stale until the next step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_ds.adaptation.surgery import WEIGHT, State, full_shape
from dynmoe_ds.engine.adam import is_apexs
from dynmoe_ds.engine.seam import sharing_group
from dynmoe_ds.errors import CheckpointError, SurgeryError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fragment:
    """The part of a parameter whose optimiser state is on this rank: elements [start, stop) of the flattened parameter.

    master and the entries of state are flat float32 views of that part.
    """

    start: int
    stop: int
    master: Tensor
    state: dict[str, Tensor]


class EngineMasters:
    """Reads and writes rows of one DeepSpeed engine's masters and moments. Use only between `step()` and a forward."""

    def __init__(self, deepspeed_engine: Any) -> None:
        self._stage: int = deepspeed_engine.zero_optimization_stage()
        self._optimizer = deepspeed_engine.optimizer
        # At ZeRO-0 in float32 DeepSpeed steps the optimiser itself; otherwise it wraps it.
        self._basic = getattr(self._optimizer, "optimizer", self._optimizer)

    def state_names(self) -> tuple[str, ...]:
        """The optimiser's entries per element, such as `exp_avg`; none before its first step."""
        names = set()
        for key, entries in self._basic.state.items():
            names |= {name for name, value in entries.items() if torch.is_tensor(value) and value.shape == key.shape}
        return tuple(sorted(names))

    def check_states(self) -> None:
        """Raises: CheckpointError for an optimiser that keeps more than its step and numbers per weight."""
        for key, entries in self._basic.state.items():
            for name, value in entries.items():
                if name != "step" and value is not None and not (torch.is_tensor(value) and value.shape == key.shape):
                    raise CheckpointError(
                        f"{self.optimizer_name()} keeps {name}, which is not one number per weight: checkpoints and "
                        "pools of another size do not know what to do with it. Use Adam, AdamW or SGD."
                    )

    def covers(self, tensor: Tensor) -> bool:
        """Whether the optimiser trains a tensor of the model; the same on all ranks."""
        if not isinstance(tensor, nn.Parameter) or not tensor.requires_grad:
            return False
        if _is_zero3(tensor):
            return self._optimizer.get_param_id(tensor) in self._optimizer.grad_position
        if self._stage > 0:
            return hasattr(tensor, "_hp_mapping")
        return any(tensor is param for group in self._zero0_groups() for param in group)

    def optimizer_name(self) -> str:
        """The class of the optimiser that updates the masters."""
        return type(self._basic).__name__

    def make_states(self, names: tuple[str, ...]) -> None:
        """Give every master the entries `names`, zeros where it had none: optimisers make them at their first step.

        Raises: CheckpointError where the optimiser has entries under other names by now, such as amsgrad's.
        """
        present = self.state_names()
        if names and present and set(names) != set(present):
            raise CheckpointError(
                f"The checkpoint's optimiser has {', '.join(names)} per weight, but this one has {', '.join(present)}. "
                "Use the optimiser that it was written with."
            )
        for key in self._keys():
            if not names:
                self._basic.state.pop(key, None)
            elif not self._basic.state.get(key):
                zeros = {name: torch.zeros_like(key.data) for name in names}
                self._basic.state[key] = {**self._new_step(key), **zeros}

    def _new_step(self, key: Tensor) -> dict[str, Any]:
        """What counts a master's updates: apex does it in the group, and fused kernels want whole numbers."""
        if is_apexs(self._basic):
            self._group_of(key).setdefault("step", 0)
            return {}
        is_deepspeeds = type(self._basic).__module__.startswith("deepspeed.")
        return {"step": 0 if is_deepspeeds else torch.zeros((), dtype=torch.float32)}

    def step_of(self, param: nn.Parameter) -> float | None:
        """The number of updates that a parameter has had; None where this rank does not know, or nothing counts."""
        key = self._key(param)
        step = None if key is None else self._basic.state.get(key, {}).get("step", self._group_of(key).get("step"))
        return None if step is None else float(step)

    def set_step(self, param: nn.Parameter, step: float) -> None:
        """Set the number of updates of the master that holds a parameter."""
        key = self._key(param)
        if key is None:
            return
        group = self._group_of(key)
        for holder in (self._basic.state.get(key, {}), group):
            if torch.is_tensor(holder.get("step")):
                holder["step"].fill_(step)
            elif "step" in holder:
                holder["step"] = type(holder["step"])(step)

    @torch.no_grad()
    def read(self, param: nn.Parameter, start: int, stop: int) -> State:
        """Rows [start, stop) of master (`weight`) and state, float32, on the parameter's device.

        Collective from ZeRO-1 on: the parameter's replicas, after the first optimiser step.
        """
        names = (WEIGHT, *self.state_names())
        rows_shape = (stop - start, *full_shape(param)[1:])
        low, high = self._range(param, start, stop)
        buffer = torch.zeros(len(names), high - low, device=param.device)
        fragment = self._fragment(param)
        if fragment is not None:
            a, b = max(low, fragment.start), min(high, fragment.stop)
            if a < b:
                for line, name in zip(buffer, names, strict=True):
                    source = fragment.master if name == WEIGHT else fragment.state.get(name)
                    if source is not None:
                        line[a - low : b - low] = source[a - fragment.start : b - fragment.start]
        if self._stage > 0:
            # Every element is on one rank of the group and zero on the others.
            dist.all_reduce(buffer, group=sharing_group(param))
        return {name: line.view(rows_shape) for name, line in zip(names, buffer, strict=True)}

    @torch.no_grad()
    def write(self, param: nn.Parameter, start: int, stop: int, state: State) -> None:
        """Set rows [start, stop) of master, state and the model's own copy. Local; all replicas must give the same."""
        low, high = self._range(param, start, stop)
        fragment = self._fragment(param)
        if fragment is not None:
            a, b = max(low, fragment.start), min(high, fragment.stop)
            if a < b:
                for name, value in state.items():
                    target = fragment.master if name == WEIGHT else fragment.state.get(name)
                    if target is not None:
                        target[a - fragment.start : b - fragment.start] = value.reshape(-1)[a - low : b - low]
        self._write_model_copy(param, low, high, state[WEIGHT].reshape(-1), fragment)

    @torch.no_grad()
    def write_frozen(self, param: nn.Parameter, value: Tensor) -> None:
        """Set a parameter that the optimiser does not train, whole. Local; all replicas must give the same."""
        if not _is_zero3(param):
            param.data.copy_(value)
            return
        start, stop = self._zero3_range(param)
        if start < stop:
            param.ds_tensor.data[: stop - start] = value.reshape(-1)[start:stop]  # type: ignore[attr-defined]
        if param.data.numel() == param.ds_numel:  # type: ignore[attr-defined]
            param.data.copy_(value)

    def memory_of(self, params: Iterable[nn.Parameter]) -> dict[str, int]:
        """Bytes on this rank of `weights`, `gradients`, `masters` and `moments` of whole groups of parameters.

        gradients: those that are there now. masters: none for a weight that is its own master.
        """
        found = dict.fromkeys(("weights", "gradients", "masters", "moments"), 0)
        partitions: dict[int, Any] = {}
        for param in params:
            weight = param.ds_tensor if _is_zero3(param) else param.data  # type: ignore[attr-defined]
            found["weights"] += weight.numel() * weight.element_size()
            if param.grad is not None:
                found["gradients"] += param.grad.numel() * param.grad.element_size()
            fragment = self._fragment(param) if self.covers(param) else None
            if fragment is not None:
                is_own = fragment.master.data_ptr() == weight.data_ptr()
                found["masters"] += 0 if is_own else fragment.master.numel() * fragment.master.element_size()
                found["moments"] += sum(value.numel() * value.element_size() for value in fragment.state.values())
            partitions |= self._gradient_partitions(param)
        tensors = [tensor for partition in partitions.values() for tensor in partition]
        found["gradients"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found

    def _gradient_partitions(self, param: Any) -> dict[int, list[Tensor]]:
        """Where ZeRO keeps this rank's part of the gradient, by a number that parameters of one partition share."""
        if _is_zero3(param):
            held = self._optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.get(param.ds_id)
            return {} if held is None else {param.ds_id: [held]}
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is None:
            return {}
        held = self._optimizer.averaged_gradients.get(mapping.param_group_index)
        if held is None:
            return {}
        return {mapping.param_group_index: [held] if torch.is_tensor(held) else list(held)}

    def _write_model_copy(
        self, param: nn.Parameter, low: int, high: int, value: Tensor, fragment: _Fragment | None
    ) -> None:
        """The weight that the next forward uses, in the model's dtype."""
        if not _is_zero3(param):
            param.data.view(-1)[low:high] = value.to(param.dtype)
            return
        if fragment is not None:
            a, b = max(low, fragment.start), min(high, fragment.stop)
            if a < b:
                shard = param.ds_tensor.data  # type: ignore[attr-defined]
                shard[a - fragment.start : b - fragment.start] = value[a - low : b - low].to(shard.dtype)
        if param.data.numel() == param.ds_numel:  # type: ignore[attr-defined]
            # Small parameters stay gathered between steps, and then the full copy is what a forward reads.
            param.data.view(-1)[low:high] = value.to(param.dtype)

    @staticmethod
    def _range(param: nn.Parameter, start: int, stop: int) -> tuple[int, int]:
        per_row = prod(full_shape(param)[1:])
        return start * per_row, stop * per_row

    def _fragment(self, param: nn.Parameter) -> _Fragment | None:
        """None when this rank holds no element of the state. Raises: SurgeryError for an unknown optimiser."""
        if _is_zero3(param):
            return self._zero3_fragment(param)
        if hasattr(param, "_hp_mapping"):
            return self._zero12_fragment(param)
        if self._stage == 0:
            return self._zero0_fragment(param)
        raise SurgeryError(
            f"Experts cannot grow or be pruned with {type(self._optimizer).__name__} at ZeRO-{self._stage}: its "
            "float32 masters were not found. Use Adam or AdamW without offloading."
        )

    def _key(self, param: Any) -> Tensor | None:
        """The tensor that the optimiser updates for a parameter; None when this rank holds no element of it."""
        if _is_zero3(param):
            position = self._optimizer.grad_position.get(self._optimizer.get_param_id(param))
            return None if position is None else self._optimizer.fp32_partitioned_groups_flat[position[0]]
        if self._stage > 0:
            mapping = getattr(param, "_hp_mapping", None)
            return None if mapping is None else self._zero12_flats()[mapping.param_group_index]
        for group, masters in zip(self._zero0_groups(), self._zero0_masters(), strict=True):
            for model_param, master in zip(group, masters, strict=True):
                if model_param is param:
                    return master
        return None

    def _keys(self) -> list[Tensor]:
        """Every tensor that the optimiser updates on this rank."""
        # At ZeRO-3 the optimiser's groups are empty between steps.
        flats = getattr(self._optimizer, "fp32_partitioned_groups_flat", None)
        return list(flats) if flats is not None else [p for g in self._basic.param_groups for p in g["params"]]

    def _group_of(self, key: Tensor) -> dict[str, Any]:
        for group in self._basic.param_groups:
            if any(param is key for param in group["params"]):
                return group
        return {}

    def _zero0_groups(self) -> list[list[nn.Parameter]]:
        """The model's trained parameters by group, at ZeRO-0."""
        groups = getattr(self._optimizer, "fp16_groups", None)
        return [group["params"] for group in self._basic.param_groups] if groups is None else groups

    def _zero0_masters(self) -> list[list[Tensor]]:
        """What the optimiser updates for each of `_zero0_groups`."""
        if hasattr(self._optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer: one master per parameter
            return self._optimizer.fp32_groups
        if hasattr(self._optimizer, "fp32_groups_flat"):  # FP16_Optimizer: one flat master per group
            groups = zip(self._zero0_groups(), self._optimizer.fp32_groups_flat, strict=True)
            return [[flat] * len(group) for group, flat in groups]
        return [list(group) for group in self._zero0_groups()]  # float32: the parameter is its own master

    def _zero12_flats(self) -> list[Tensor]:
        optimizer = self._optimizer
        return getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition

    def _zero3_range(self, param: Any) -> tuple[int, int]:
        """The elements of a parameter that are on this rank; start may be above stop."""
        size = param.ds_tensor.ds_numel
        start = self._optimizer._get_param_partition_rank(param) * size
        return start, min(start + size, param.ds_numel)

    def _zero3_fragment(self, param: Any) -> _Fragment | None:
        optimizer = self._optimizer
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
        start, stop = self._zero3_range(param)
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return self._of_flat(flat, offset, start, stop) if start < stop else None

    def _zero12_fragment(self, param: Any) -> _Fragment | None:
        mapping = param._hp_mapping
        if mapping is None:
            return None
        # Read from the flat state: DeepSpeed links fragments for the first group only.
        start = mapping.lp_fragment_address.start
        stop = start + mapping.lp_fragment_address.numel
        flat = self._zero12_flats()[mapping.param_group_index]
        return self._of_flat(flat, mapping.hp_fragment_address.start, start, stop)

    def _zero0_fragment(self, param: nn.Parameter) -> _Fragment:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer: one master per parameter
            for model_group, master_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for model_param, master in zip(model_group, master_group, strict=True):
                    if model_param is param:
                        return self._of_tensor(master)
        if hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer: one flat master per group
            for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
                offset = 0
                for model_param in group:
                    if model_param is param:
                        return self._of_flat(flat, offset, 0, param.numel())
                    offset += model_param.numel()
        return self._of_tensor(param)  # float32: the parameter is its own master

    def _of_flat(self, flat: Tensor, offset: int, start: int, stop: int) -> _Fragment:
        state = {name: value.narrow(0, offset, stop - start) for name, value in self._entries(flat).items()}
        return _Fragment(start=start, stop=stop, master=flat.data.narrow(0, offset, stop - start), state=state)

    def _of_tensor(self, master: Tensor) -> _Fragment:
        state = {name: value.view(-1) for name, value in self._entries(master).items()}
        return _Fragment(start=0, stop=master.numel(), master=master.data.view(-1), state=state)

    def _entries(self, key: Tensor) -> dict[str, Tensor]:
        entries = self._basic.state.get(key, {})
        return {name: value for name, value in entries.items() if torch.is_tensor(value) and value.shape == key.shape}


def _is_zero3(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_id")
