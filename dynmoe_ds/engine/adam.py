"""Which Adam updates the weights: torch's, DeepSpeed's or apex's. All give the same numbers, up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from dynmoe_ds.engine.seam import runs_on_gpu
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.integrations.apex import FUSED_ADAM, apex_class, require_apex_class

AdamImplementation: TypeAlias = Literal["auto", "torch", "deepspeed_fused", "apex"]
_NAMES = ("adam", "adamw")
# ZeRO-3 calls the optimiser once per part of a group, and apex counts a step of the whole group each time: Adam's bias
# correction is gone too early.
NOT_AT_ZERO3 = (
    "which counts steps wrongly at ZeRO-3, where parts of a group are updated one after the other. Use torch's or "
    "DeepSpeed's there, or a lower ZeRO stage."
)


def choose_adam(settings: dict[str, Any], adam: AdamImplementation | None) -> Callable[[Any], Any] | None:
    """Write the choice into DeepSpeed's configuration; where that cannot say it, what makes the optimiser of groups.

    adam: `auto` is apex's on a GPU where it is installed and the stage below ZeRO-3, else torch's; None is what the
    configuration says, but torch's on a CPU, where DeepSpeed's must be compiled. Torch's is used in its fused form,
    unless `foreach` is set: it reads and writes every number once and keeps nothing beside them, where the others take
    20 passes.

    Raises: ConfigError for one that is not there, that needs a GPU, or that is no Adam.
    """
    optimizer = settings.get("optimizer") or {}
    is_adam = str(optimizer.get("type", "")).lower() in _NAMES
    if adam is not None and not is_adam:
        raise ConfigError(
            f"adam is {adam} but the optimiser of DeepSpeed's configuration is {optimizer.get('type')!r}. Use Adam or "
            "AdamW there, or leave adam out."
        )
    if not is_adam:
        return None
    if adam is not None and adam not in get_args(AdamImplementation):
        raise ConfigError(f"adam is {adam!r}. Use {', '.join(get_args(AdamImplementation))}.")
    has_gpu = runs_on_gpu()
    params = optimizer.setdefault("params", {})
    if adam in ("deepspeed_fused", "apex") and not has_gpu:
        raise ConfigError(f"adam is {adam} but its kernels are for GPUs, and this run is on CPUs. Use auto or torch.")
    is_zero3 = (settings.get("zero_optimization") or {}).get("stage") == 3
    if adam == "apex":
        require_apex_class(FUSED_ADAM, "adam is apex")
        if is_zero3:
            raise ConfigError(f"adam is apex, {NOT_AT_ZERO3}")
        return apex_adam(optimizer)
    if adam == "auto" and has_gpu and not is_zero3 and apex_class(FUSED_ADAM) is not None:
        return apex_adam(optimizer)
    if adam is not None:
        params["torch_adam"] = adam != "deepspeed_fused"
    elif not has_gpu:
        params.setdefault("torch_adam", True)
    if params.get("torch_adam") and "foreach" not in params:
        params.setdefault("fused", True)
    return None


def optimizer_faults(optimizer: Any, adam: str | None, stage: int) -> list[str]:
    """What is wrong with an optimiser that the user has made."""
    found = []
    if adam is not None:
        found.append(f"adam is {adam} but an optimizer is given, too. Leave out one of them.")
    if stage == 3 and is_apexs(optimizer):
        found.append(f"The optimizer is apex's {type(optimizer).__name__}, {NOT_AT_ZERO3}")
    return found


def is_apexs(optimizer: Any) -> bool:
    """Whether an optimiser is apex's."""
    return type(optimizer).__module__.partition(".")[0] == "apex"


def apex_adam(optimizer: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What makes apex's fused Adam of parameter groups, from the optimiser section of DeepSpeed's configuration.

    Raises: ConfigError for options that it does not have.
    """
    params = {key: value for key, value in optimizer["params"].items() if key not in ("torch_adam", "fused", "foreach")}
    is_decoupled = optimizer["type"].lower() == "adamw" or params.pop("adam_w_mode", True)
    params.pop("adam_w_mode", None)
    if unknown := set(params) - {"lr", "betas", "eps", "weight_decay", "bias_correction"}:
        raise ConfigError(f"apex's FusedAdam has no {', '.join(sorted(unknown))}. Leave it out, or use adam=torch.")
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    return lambda groups: apex_class(FUSED_ADAM)(groups, adam_w_mode=is_decoupled, **params)
