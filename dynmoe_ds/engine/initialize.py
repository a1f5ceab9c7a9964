"""`dynmoe_ds.initialize`: `deepspeed.initialize` for models with `MoELayer`s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_args

import torch.distributed as dist
from torch import nn

from dynmoe_ds.adaptation import AdaptationConfig, rule_fault
from dynmoe_ds.dispatch import DispatchConfig
from dynmoe_ds.distributed import assert_same_on_all_ranks, ep_size_fault, raise_together
from dynmoe_ds.engine import seam
from dynmoe_ds.engine.adam import AdamImplementation, choose_adam, optimizer_faults
from dynmoe_ds.engine.construction import Construction
from dynmoe_ds.engine.engine import Engine
from dynmoe_ds.engine.non_finite import OnNonFinite
from dynmoe_ds.engine.tensor_parallel import agree_on_replicas, tensor_parallel_faults, tp_size_of
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.moe import MoELayer, moe_layers, watch_padding

ParamGroups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


def initialize(
    model: nn.Module,
    config: Mapping[str, Any] | str | Path,
    adaptation: AdaptationConfig | None = None,
    *,
    model_parameters: ParamGroups | None = None,
    optimizer: Any = None,
    lr_scheduler: Any = None,
    timeout_s: float = 600.0,
    token_kinds: Sequence[str] = (),
    on_non_finite: OnNonFinite = "stop",
    dispatch: DispatchConfig | None = None,
    mpu: Any = None,
    adam: AdamImplementation | None = None,
) -> Engine:
    """An engine that trains `model` under DeepSpeed, with experts that grow and are pruned if `adaptation` is given.

    model: any module with `MoELayer`s in it. config: DeepSpeed's configuration, a dictionary or the path of its JSON
    file; ZeRO 0 to 3, float32 or bf16. model_parameters: parameters or optimiser groups, by default all that require a
    gradient. optimizer, lr_scheduler: as in `deepspeed.initialize`. timeout_s: how long a rank waits for another one,
    where torch.distributed is not initialised yet. token_kinds: names of the kinds of tokens that a batch may tell
    apart; `engine(..., token_kinds=tensor)` counts tokens and experts of each. on_non_finite: what `engine.step` does
    about NaN or infinity on any rank: `stop` raises NonFiniteError on all, `skip_step` leaves that update out.
    dispatch: how rows travel between ranks, in every layer; None leaves each layer's own. mpu: the tensor-parallel
    groups, as in `deepspeed.initialize`, for layers that were built with their `tp_group`; for megatron-core
    `dynmoe_ds.integrations.megatron.MegatronGroups`. Checkpoints and pools of another size do not work with it yet.
    adam: which implementation of Adam updates the weights (`choose_adam`); None for what the configuration says.

    Differs from DeepSpeed: gradients are not clipped unless `gradient_clipping` says so (DeepSpeed clips to 1.0), and
    on a CPU Adam is torch's, which needs no compiler.

    Collective: every rank. Raises: ConfigError for what cannot work, DivergenceError if the ranks differ in
    configuration or model; on every rank, before anything is shared.
    """
    seam.init_distributed(timeout_s)
    layers = moe_layers(model)
    error: Exception | None = None
    settings: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    make_optimizer = None
    try:
        settings = _read_config(config)
        groups = _param_groups(model, model_parameters)
        if faults := [
            *_faults(settings, layers, adaptation, tp_size_of(mpu)),
            *_kind_faults(token_kinds),
            *_policy_faults(on_non_finite),
            *_dispatch_faults(dispatch, layers),
            *tensor_parallel_faults(mpu, layers),
        ]:
            error = ConfigError(faults)
        elif optimizer is None:
            make_optimizer = choose_adam(settings, adam)
        elif faults := optimizer_faults(optimizer, adam, _stage(settings)):
            error = ConfigError(faults)
    except Exception as e:  # whatever it is, the other ranks must not wait for this one
        error = e
    raise_together(error)
    fingerprint = _fingerprint(settings, model, layers, adaptation, token_kinds)
    fingerprint["dispatch"] = None if dispatch is None else asdict(dispatch)
    fingerprint["on_non_finite"] = on_non_finite
    assert_same_on_all_ranks("the configuration of the run", fingerprint)

    stage = _stage(settings)
    clipping = float(settings.get("gradient_clipping") or 0.0)
    settings["gradient_clipping"] = clipping
    if stage == 0:
        settings["gradient_clipping"] = 0.0  # the engine clips by itself: see engine/clipping.py
    for name, layer in layers.items():
        layer.name = name
        layer.dispatch = dispatch or layer.dispatch
    _share_seeds(layers)
    if tp_size_of(mpu) > 1:
        agree_on_replicas(model, layers, mpu.get_model_parallel_group())
    construction = Construction(model, layers, settings, groups, optimizer or make_optimizer, lr_scheduler, mpu)
    padding = watch_padding(model)
    return Engine(construction, layers, adaptation, padding, clipping, tuple(token_kinds), on_non_finite)


def _read_config(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A deep copy of DeepSpeed's configuration."""
    try:
        settings = json.loads(json.dumps(dict(config)) if isinstance(config, Mapping) else Path(config).read_text())
    except TypeError as e:
        raise ConfigError(f"DeepSpeed's configuration holds a value that JSON cannot: {e}.") from e
    except OSError as e:
        raise ConfigError(f"DeepSpeed's configuration {config} cannot be read: {e.strerror}.") from e
    except ValueError as e:
        raise ConfigError(f"DeepSpeed's configuration {config} is not valid JSON: {e}.") from e
    if not isinstance(settings, dict):
        raise ConfigError(f"DeepSpeed's configuration must be a dictionary but is {type(settings).__name__}.")
    return settings


def _dispatch_faults(dispatch: DispatchConfig | None, layers: Mapping[str, MoELayer]) -> list[str]:
    sizes = dict.fromkeys(layer.ep_size for layer in layers.values())
    return [] if dispatch is None else [fault for ep_size in sizes for fault in dispatch.faults_with(ep_size)]


def _stage(settings: Mapping[str, Any]) -> int:
    return int(_section(settings, "zero_optimization").get("stage", 0))


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of DeepSpeed's configuration; empty if it is absent or null."""
    section = settings.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} is {section!r} in DeepSpeed's configuration but must be a dictionary.")
    return section


def _faults(
    settings: Mapping[str, Any], layers: Mapping[str, MoELayer], adaptation: AdaptationConfig | None, tp_size: int
) -> list[str]:
    zero = _section(settings, "zero_optimization")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        return [f"zero_optimization.stage is {zero.get('stage')!r}. Use 0, 1, 2 or 3."]
    found = []
    if _section(settings, "fp16").get("enabled"):
        found.append("fp16 is enabled but experts are trained in float32 or bfloat16. Use bf16.")
    for device in ("offload_optimizer", "offload_param"):
        if _section(zero, device).get("device", "none") not in ("none", None):
            found.append(
                f"zero_optimization.{device} is set, but experts grow and are pruned in optimiser state on the "
                "device only. Remove it."
            )
    if _stage(settings) == 3:
        # DeepSpeed checks these for its own experts only.
        if zero.get("zero_hpz_partition_size", 1) > 1:
            found.append("zero_optimization.zero_hpz_partition_size does not work with experts at ZeRO-3. Remove it.")
        if zero.get("zero_quantized_gradients"):
            found.append("zero_optimization.zero_quantized_gradients does not work with experts at ZeRO-3. Remove it.")
    if settings.get("sequence_parallel_size", 1) > 1:
        found.append("sequence_parallel_size does not work with experts. Use 1.")
    accumulate = _section(settings, "data_types").get("grad_accum_dtype")
    is_bf16 = _section(settings, "bf16").get("enabled")
    if _stage(settings) == 0 and is_bf16 and accumulate == "fp32":
        found.append("data_types.grad_accum_dtype is fp32, which DeepSpeed cannot do in bf16 at ZeRO-0. Use ZeRO-1.")
    found += _frozen_faults(layers, _stage(settings), adaptation)
    world_size = dist.get_world_size() // tp_size
    for name, layer in layers.items():
        if fault := ep_size_fault(layer.ep_size, world_size):
            found.append(f"{name}: {fault}")
    if adaptation is not None:
        if not layers:
            found.append("adaptation is given but the model has no MoELayer.")
        if tp_size > 1 and adaptation.pool == "elastic":
            found.append("adaptation.pool is elastic, which does not work with tensor parallelism yet. Use fixed.")
        by_layer = [rule_fault(adaptation, layer.router.config) for layer in layers.values()]
        found += dict.fromkeys(fault for fault in by_layer if fault is not None)
    return found


def _frozen_faults(layers: Mapping[str, MoELayer], stage: int, adaptation: AdaptationConfig | None) -> Iterator[str]:
    """Frozen experts have no optimiser state to grow in, and no parameter group for ZeRO-1 and 2."""
    for name, layer in layers.items():
        own = {key: param for key, param in layer.named_parameters() if not key.startswith("shared.")}
        frozen = [key for key, param in own.items() if not param.requires_grad]
        if frozen and adaptation is not None:
            yield f"{name}: adaptation needs parameters that train, but {', '.join(frozen)} are frozen."
        elif stage in (1, 2) and any(key.startswith("experts.") for key in frozen):
            yield f"{name}: experts are frozen, which DeepSpeed cannot do at ZeRO-{stage}. Use ZeRO-0 or 3."


def _kind_faults(token_kinds: Sequence[str]) -> list[str]:
    """A name becomes a part of metric names, between slashes."""
    if isinstance(token_kinds, str):
        return [f"token_kinds is {token_kinds!r} but must be a sequence of names, such as ({token_kinds!r},)."]
    odd = [name for name in token_kinds if not isinstance(name, str) or not name or "/" in name]
    found = [f"token_kinds holds {name!r}. Use names that are not empty and have no slash." for name in odd]
    if not found and len(set(token_kinds)) < len(token_kinds):
        found.append(f"token_kinds is {list(token_kinds)} but every name must be there once.")
    return found


def _policy_faults(on_non_finite: str) -> list[str]:
    policies = get_args(OnNonFinite)
    return [] if on_non_finite in policies else [f"on_non_finite is {on_non_finite!r}. Use {' or '.join(policies)}."]


def _fingerprint(
    settings: Mapping[str, Any],
    model: nn.Module,
    layers: Mapping[str, MoELayer],
    adaptation: AdaptationConfig | None,
    token_kinds: Sequence[str],
) -> dict[str, Any]:
    """What must be equal on all ranks, in words that tell a person where to look."""
    values: dict[str, Any] = {f"deepspeed.{key}": value for key, value in settings.items()}
    values["token_kinds"] = list(token_kinds)
    for key, value in (asdict(adaptation) if adaptation else {"adaptation": None}).items():
        values[f"adaptation.{key}"] = value
    for name, layer in layers.items():
        router = layer.router.config
        described = {
            "hidden_size": layer.hidden_size,
            "ffn_hidden_size": layer.ffn_hidden_size,
            "num_slots": layer.num_slots,
            "ep_size": layer.ep_size,
            "expert": layer.expert_kind,
            "dispatch": asdict(layer.dispatch),
            "expert_ids": layer.placement.expert_ids,
            "router": [type(router).__name__, asdict(router) if is_dataclass(router) else str(router)],
        }
        values |= {f"{name}.{key}": value for key, value in described.items()}
    shapes = [(name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    values["model parameters"] = {
        "count": len(shapes),
        "sha256": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
    }
    return values


def _share_seeds(layers: Mapping[str, MoELayer]) -> None:
    """One seed per layer for all ranks: replicas must draw the same noise for a new expert."""
    seeds = [[layer.seed for layer in layers.values()]]
    dist.broadcast_object_list(seeds, src=0)
    for layer, seed in zip(layers.values(), seeds[0], strict=True):
        layer.seed = seed


def _param_groups(model: nn.Module, model_parameters: ParamGroups | None) -> list[dict[str, Any]]:
    given: list[Any] = list(model.parameters() if model_parameters is None else model_parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    trained = []
    for group in groups:
        params = [param for param in group["params"] if param.requires_grad]
        if params:
            trained.append({**group, "params": params})
    if not trained:
        raise ConfigError("No parameter requires a gradient, so there is nothing to train.")
    return trained
