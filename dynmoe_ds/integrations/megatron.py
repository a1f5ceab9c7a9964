"""megatron-core, which is optional: whether it is there, and its modules when they are needed."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from types import ModuleType
from typing import Any

from dynmoe_ds.errors import ConfigError

DISTRIBUTION = "megatron-core"


def find_megatron() -> str | None:
    """The version of the installed megatron-core, None where there is none. Nothing of it is imported."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def megatron_module(name: str, needed_for: str) -> ModuleType:
    """The module `megatron.core.<name>`, imported now: the first one takes seconds.

    Raises: ConfigError, naming the extra to install and what is `needed_for`, where megatron-core is missing.
    """
    if find_megatron() is None:
        raise ConfigError(
            f"{needed_for} needs megatron-core, which is not installed. Install it with "
            "`pip install 'dynmoe-ds[megatron]'` (Python 3.11; later versions of Python are not supported yet)."
        )
    with warnings.catch_warnings():
        # That Transformer Engine and apex are missing, which it does without, and what it has deprecated itself.
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.{name}")


class MegatronGroups:
    """The groups of megatron-core's `parallel_state` under the names that DeepSpeed asks for.

    engine = dm.initialize(model=model, config=config, mpu=MegatronGroups())

    Raises: ConfigError without megatron-core, or where it is not initialised.
    """

    def __init__(self) -> None:
        self._state: Any = megatron_module("parallel_state", "MegatronGroups")
        if not self._state.is_initialized():
            raise ConfigError(
                "MegatronGroups needs the groups of megatron-core. Call megatron.core.parallel_state."
                "initialize_model_parallel(tensor_model_parallel_size=...) first."
            )

    def get_model_parallel_group(self) -> Any:
        return self._state.get_tensor_model_parallel_group()

    def get_model_parallel_rank(self) -> int:
        return int(self._state.get_tensor_model_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        return int(self._state.get_tensor_model_parallel_world_size())

    def get_data_parallel_group(self) -> Any:
        return self._state.get_data_parallel_group()

    def get_data_parallel_rank(self) -> int:
        return int(self._state.get_data_parallel_rank())

    def get_data_parallel_world_size(self) -> int:
        return int(self._state.get_data_parallel_world_size())
