"""Hugging Face models and configurations from local folders."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from dynmoe_ds.errors import ConfigError


def pretrained_config(key: str, folder: str | None, model_types: Collection[str] | None = None) -> PreTrainedConfig:
    """The configuration in the folder that the configuration key `key` names; nothing is downloaded.

    Raises: ConfigError for no folder, one that cannot be read, or a model of another type than `model_types`.
    """
    assert folder is not None, f"{key} is not set"
    if not Path(folder).is_dir():
        raise ConfigError(
            f"{key} is {folder!r}, which is not a folder here ({Path.cwd()}). Download the model on every machine and "
            "name its folder."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever the first wrong value leads to
        raise ConfigError(f"{key} is {folder!r}, whose configuration cannot be read: {error}") from error
    if model_types is not None and config.model_type not in model_types:
        raise ConfigError(
            f"{key} is {folder!r}, which holds a model of type {config.model_type} where {' or '.join(model_types)} is "
            "needed."
        )
    return config


def pretrained_model(
    key: str, kind: Any, folder: str, config: PreTrainedConfig, new_parts: tuple[str, ...] = ()
) -> PreTrainedModel:
    """The folder's model in float32. kind: its class, or an Auto class. new_parts: names begin so of what starts anew.

    Raises: ConfigError if the weights cannot be loaded, or anything else is not in the folder.
    """
    try:
        model, loaded = kind.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # of the new parts; the others are looked at below
            output_loading_info=True,
        )
    except Exception as error:  # safetensors and torch raise whatever the first wrong byte leads to
        raise ConfigError(f"{key} is {folder!r}, whose weights cannot be loaded: {error}") from error
    absent = [*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])]
    if wrong := sorted(name for name in absent if not name.startswith(new_parts or "\0")):
        raise ConfigError(
            f"{key} is {folder!r}, whose weights lack {len(wrong)} tensors of its configuration, or have them in other "
            f"shapes, such as {wrong[0]}."
        )
    assert isinstance(model, PreTrainedModel), type(model)
    return model
