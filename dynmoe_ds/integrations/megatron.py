"""megatron-core, which is optional: whether it is there, its groups for DeepSpeed, and `MoELayer` in its layers."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from types import ModuleType
from typing import Any

from torch import Tensor

from dynmoe_ds.dispatch import DispatchConfig
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.moe import MoELayer
from dynmoe_ds.routing import RouterConfig

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


class MegatronMoELayer(MoELayer):
    """A `MoELayer` as a layer of megatron-core calls its MLP: hidden [L, B, D], and the output comes with a bias, None.

    config: Megatron's TransformerConfig, which says D, the width of experts (`moe_ffn_hidden_size`, else
    `ffn_hidden_size`) and their dtype. settings: what `moe_layer_spec` was given. With tensor parallelism the ranks of
    a group share out the tokens. Initial weights are drawn from torch's default generator. Versions of megatron-core
    differ in what else they tell an MLP.

    Raises: ConfigError for sequence parallelism, and sizes that cannot work.
    """

    def __init__(self, config: Any, settings: dict[str, Any], submodules: Any = None, **_: Any) -> None:
        if config.sequence_parallel:
            raise ConfigError("sequence_parallel does not work with moe_layer_spec. Set it to False.")
        state = megatron_module("parallel_state", "moe_layer_spec")
        super().__init__(
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.moe_ffn_hidden_size or config.ffn_hidden_size,
            tp_group=state.get_tensor_model_parallel_group() if config.tensor_model_parallel_size > 1 else None,
            **settings,
        )
        self.to(config.params_dtype)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, *, padding_mask: Tensor | None = None) -> Any:
        """(y [L, B, D], None) for x [L, B, D]. padding_mask [B, L]: Megatron's, True is padding."""
        if padding_mask is not None:
            token_mask = ~padding_mask.bool().transpose(0, 1)
        return super().forward(x, token_mask), None


def moe_layer_spec(
    *,
    num_experts: int,
    num_slots: int,
    ep_size: int = 1,
    router: str | RouterConfig = "top_any",
    expert: str = "swiglu",
    dispatch: DispatchConfig | None = None,
) -> Any:
    """The spec of a `MoELayer` for `mlp` of a layer spec of megatron-core; the arguments are the layer's.

    spec = get_gpt_layer_local_spec()
    spec.submodules.mlp = moe_layer_spec(num_experts=4, num_slots=16)

    Raises: ConfigError without megatron-core.
    """
    settings = {
        "num_experts": num_experts,
        "num_slots": num_slots,
        "ep_size": ep_size,
        "router": router,
        "expert": expert,
        "dispatch": dispatch,
    }
    spec_utils = megatron_module("transformer.spec_utils", "moe_layer_spec")
    return spec_utils.ModuleSpec(module=MegatronMoELayer, params={"settings": settings})
