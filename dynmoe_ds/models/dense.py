"""Hugging Face models without experts, with random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from dynmoe_ds.models.random_weights import seeded_weights
from dynmoe_ds.models.rotary import keep_frequencies_exact

M = TypeVar("M", bound=PreTrainedModel)


def dense_model(kind: type[M], config: PreTrainedConfig | Mapping[str, Any], seed: int) -> M:
    """A float32 model of a class of transformers on the CPU; the global random state is left as it was."""
    made: Any = kind.config_class
    given = config if isinstance(config, PreTrainedConfig) else made.from_dict(dict(config))
    with seeded_weights(seed):
        model: Any = kind(given)
        if kind is LlavaForConditionalGeneration:
            _fit_output_layer(model)
    keep_frequencies_exact(model)
    return model


def empty_model(kind: type[M], config: PreTrainedConfig | Mapping[str, Any]) -> M:
    """`dense_model` without memory for its parameters, which are on torch's meta device; buffers have their values."""
    with _parameters_on_meta():
        return dense_model(kind, config, seed=0)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, a module's parameters lose their memory when it gets them, before anything is written there.

    Not `torch.device("meta")`, under which buffers, such as a rotary embedding's frequencies, would have no values.
    Source: `init_empty_weights` of accelerate.
    """
    ordinary = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is tied stays the same
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        ordinary(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = ordinary  # type: ignore[method-assign]


def _fit_output_layer(model: LlavaForConditionalGeneration) -> None:
    """Give a Llava's output layer a bias where that of its language model has one, as Phi's."""
    with torch.device("meta"):
        output: Any = AutoModelForCausalLM.from_config(model.config.text_config).get_output_embeddings()
    if output.bias is not None:
        model.lm_head = nn.Linear(output.in_features, output.out_features)
