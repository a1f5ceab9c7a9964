"""Hugging Face models without experts, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
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


def _fit_output_layer(model: LlavaForConditionalGeneration) -> None:
    """Give a Llava's output layer a bias where that of its language model has one, as Phi's."""
    with torch.device("meta"):
        output: Any = AutoModelForCausalLM.from_config(model.config.text_config).get_output_embeddings()
    if output.bias is not None:
        model.lm_head = nn.Linear(output.in_features, output.out_features)
