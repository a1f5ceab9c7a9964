"""The launch configuration from `configs/launch/` or a file, under overrides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynmoe_ds.config.build import build_what_can_be
from dynmoe_ds.config.groups import LAUNCH_GROUP, launch_names
from dynmoe_ds.config.own_groups import read_option
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.launching.config import (
    AnyLaunchConfig,
    DeepSpeedConfig,
    KubernetesConfig,
    LocalConfig,
    SlurmConfig,
    TorchrunConfig,
)

_KINDS: dict[str, type[AnyLaunchConfig]] = {
    "local": LocalConfig,
    "deepspeed": DeepSpeedConfig,
    "torchrun": TorchrunConfig,
    "slurm": SlurmConfig,
    "kubernetes": KubernetesConfig,
}


def load_launch(name: str, values: Sequence[tuple[str, Any]]) -> tuple[AnyLaunchConfig | None, list[str]]:
    """The launch configuration `name`, or that of a file `name`, with `values` by key, such as ("nodes", 4).

    With it every fault: an unknown name, unknown keys, wrong and impossible values. None where it cannot be made.
    """
    try:
        plain = read_option(LAUNCH_GROUP, name, launch_names(), values)
    except ConfigError as error:
        return None, list(error.faults)
    kind = plain.get("name")
    if not isinstance(kind, str) or kind not in _KINDS:
        return None, [f"launch.name is {kind!r}. Use {', '.join(_KINDS)}."]
    return build_what_can_be(_KINDS[kind], plain, LAUNCH_GROUP)
