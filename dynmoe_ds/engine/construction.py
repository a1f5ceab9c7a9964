"""Making DeepSpeed's engine, and taking it down again so that nothing of it is left in the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

from dynmoe_ds.adaptation.surgery import full_shape
from dynmoe_ds.engine import seam
from dynmoe_ds.errors import SurgeryError
from dynmoe_ds.moe import MoELayer, Placement

# What DeepSpeed's engines leave in a module's attributes, besides names that begin with ds_.
_LEFT_IN_MODULES = {
    "_external_params",
    "_original_parameters",
    "pre_bwd_fn",
    "post_bwd_fn",
    "applied_pre_backward_ref_cnt",
}

# What torch's schedulers keep per group of the optimiser.
_PER_GROUP = ("base_lrs", "lr_lambdas", "_last_lr", "min_lrs")


class Construction:
    """How the DeepSpeed engine of a model is made: as often as the sizes of its pools change.

    groups: the optimiser's, of parameters that require a gradient. settings: DeepSpeed's configuration.
    mpu: as for `deepspeed.initialize`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, MoELayer],
        settings: Mapping[str, Any],
        groups: list[dict[str, Any]],
        optimizer: Any,
        lr_scheduler: Any,
        mpu: Any = None,
    ) -> None:
        self.mpu = mpu
        self._model, self._layers, self._settings = model, layers, settings
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.stage = int((settings.get("zero_optimization") or {}).get("stage", 0))
        names = {id(param): name for name, param in model.named_parameters()}
        # By name, since a parameter of another shape is another parameter; as itself if it is not the model's.
        self._groups = [_of_names(group, names) for group in groups]
        self._client_groups: list[dict[str, Any]] | None = None
        if isinstance(optimizer, torch.optim.Optimizer):
            self._client_groups = [_of_names(group, names) for group in optimizer.param_groups]
        self.group_names: list[list[str]] = []
        self._attributes = {name: dict(param.__dict__) for name, param in model.named_parameters()}

    def build(self) -> Any:
        """DeepSpeed's engine of the model as it is now. Collective: every rank."""
        seam.attach(self._layers.values(), self.stage, self.mpu)
        params = dict(self._model.named_parameters())
        groups = _of_params(self._groups, params)
        splits = bool(self._layers) and self.stage < 3
        if splits:
            groups = seam.split_expert_groups(groups)
        if self._client_groups is not None:
            # Given back as the user made it: DeepSpeed has put its own flat parameters there if this is not the first.
            client = _of_params(self._client_groups, params)
            self._optimizer.param_groups[:] = seam.split_expert_groups(client) if splits else client
            self._optimizer.state.clear()
            _extend_scheduler(self._lr_scheduler, client, self._optimizer.param_groups)
        final = self._optimizer.param_groups if self._client_groups is not None else groups
        names = {id(param): name for name, param in params.items()}
        self.group_names = [[names[id(p)] for p in group["params"] if id(p) in names] for group in final]
        engine, *_ = deepspeed.initialize(
            model=self._model,
            model_parameters=groups,
            optimizer=self._optimizer,
            lr_scheduler=self._lr_scheduler,
            config=copy.deepcopy(dict(self._settings)),
            mpu=self.mpu,
        )
        if self.stage == 3:
            seam.check_partitioning(self._layers.values())
        _undo_construction_step(engine)
        return engine

    def check_removable(self) -> None:
        """Raises: SurgeryError for an optimiser that also trains what is not in the model, whose state nobody keeps."""
        for group in (*self._groups, *(self._client_groups or ())):
            if any(not isinstance(param, str) for param in group["params"]):
                raise SurgeryError(
                    "The pool cannot change its size: the optimiser trains parameters that are not in the model. Make "
                    "them parameters of the model, or use adaptation.pool=fixed."
                )

    def take_down(self, engine: Any, placements: Mapping[str, Placement]) -> None:
        """End a DeepSpeed engine and give the model new parameters, all zero, and its layers pools for `placements`.

        After it nothing of the engine is left in the model, so that its memory is free once the caller lets go of it.
        """
        old = list(self._model.named_parameters(remove_duplicate=False))
        engine.destroy()
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            if hook is not None:
                hook.remove()
        engine.module_forward_pre_hook = engine.module_forward_post_hook = None
        for module in self._model.modules():
            module._parameters = dict(module._parameters)  # ZeRO-3 has put a class of its own there
            for name in [name for name in module.__dict__ if name.startswith("ds_") or name in _LEFT_IN_MODULES]:
                del module.__dict__[name]
        for name, placement in placements.items():
            self._layers[name].renew_pool(placement)
        self._renew_parameters(old)

    def _renew_parameters(self, old: list[tuple[str, nn.Parameter]]) -> None:
        """Put zeros in the place of all parameters, tied ones still tied, with the attributes they had at first."""
        renewed: dict[int, nn.Parameter] = {}
        for name, param in old:
            owner, _, key = name.rpartition(".")
            module = self._model.get_submodule(owner)
            if id(param) not in renewed:
                present = module._parameters[key]
                # The layers' parameters are new already, of the new shape.
                shape = full_shape(param) if present is param else present.shape  # type: ignore[union-attr]
                new = nn.Parameter(torch.zeros(shape, dtype=param.dtype, device=param.device), param.requires_grad)
                new.__dict__.update(self._attributes.get(name, {}))
                renewed[id(param)] = new
            module._parameters[key] = renewed[id(param)]
        for _, param in old:
            # Cycles between a parameter and ZeRO's optimiser go through memory that the garbage collector cannot see.
            param.grad = None
            param.data = torch.empty(0, dtype=param.dtype)
            param.__dict__.clear()


def _extend_scheduler(scheduler: Any, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Give a scheduler of torch's, made for the groups `before`, its numbers per group for those that came of them."""
    for part in getattr(scheduler, "_schedulers", ()):
        _extend_scheduler(part, before, after)
    origin = {id(param): index for index, group in enumerate(before) for param in group["params"]}
    for name in _PER_GROUP:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == len(before) < len(after):
            setattr(scheduler, name, [values[origin[id(group["params"][0])]] for group in after])


def _of_names(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    return {**group, "params": [names.get(id(param), param) for param in group["params"]]}


def _of_params(groups: list[dict[str, Any]], params: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {**group, "params": [params.get(p, p) if isinstance(p, str) else p for p in group["params"]]}
        for group in groups
    ]


def _undo_construction_step(engine: Any) -> None:
    """Undo the step on zero gradients that DeepSpeed takes in bfloat16 at ZeRO-0 while it is being built.

    It decays the masters before training and leaves Adam's step count at 1.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() > 0 or not hasattr(optimizer, "fp16_groups"):
        return
    optimizer.optimizer.state.clear()
    for group in optimizer.optimizer.param_groups:
        group.pop("step", None)  # where fused Adam counts
    if hasattr(optimizer, "fp32_groups"):
        masters = [[master.data for master in group] for group in optimizer.fp32_groups]
    else:
        sizes = [[param.numel() for param in group] for group in optimizer.fp16_groups]
        flats = zip(optimizer.fp32_groups_flat, sizes, strict=True)
        masters = [list(flat.data[: sum(parts)].split(parts)) for flat, parts in flats]
    for model_group, master_group in zip(optimizer.fp16_groups, masters, strict=True):
        for param, master in zip(model_group, master_group, strict=True):
            master.view(-1).copy_(param.data.view(-1))
