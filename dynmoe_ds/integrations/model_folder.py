"""A model of text and its tokenizer from whatever folder of this project, or of Hugging Face, they are in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dynmoe_ds.data import load_pretrained_tokenizer
from dynmoe_ds.errors import CheckpointError, DataError
from dynmoe_ds.export import load_model, register_auto_classes
from dynmoe_ds.export.manifest import MANIFEST_FILE
from dynmoe_ds.moe import MoELayer, PaddingMask
from dynmoe_ds.training.saved_run import CONFIG_FILE, SavedRun
from dynmoe_ds.training.tasks.vision_language import TOKENIZER_FOLDER

HUGGING_FACE_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"


def load_written_model(folder: Path, device: str | None = None) -> PreTrainedModel:
    """The model in a folder of a finished run, of `save_model`, or of Hugging Face's `save_pretrained`, evaluating.

    Its layers know their names, and padding by the model's `attention_mask`. device: None, or CUDA where there is none,
    takes the accelerator if there is one. Nothing is downloaded.

    Raises: DataError for a folder that is none of these, and for runs as `SavedRun`; CheckpointError for a model that
    cannot be loaded.
    """
    if (folder / CONFIG_FILE).exists():
        model = SavedRun(folder).model
    else:
        if (folder / MANIFEST_FILE).exists():
            model = load_model(folder)
        elif (folder / HUGGING_FACE_FILE).exists():
            model = _from_pretrained(folder)
        else:
            raise DataError(
                f"{folder} has no {CONFIG_FILE}, {MANIFEST_FILE} or {HUGGING_FACE_FILE} (seen from {Path.cwd()}). Name "
                "the folder of a finished run, one of `dynmoe export`, or another model in Hugging Face's format."
            )
        padding = PaddingMask()
        padding.watch(model)
        for name, module in model.named_modules():
            if isinstance(module, MoELayer):
                module.name, module.padding = name, padding
    # The harness's own command says cuda:0 where the user says nothing.
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if found is None else found.type
    placed: Any = model.to(device)
    return placed.eval()


def load_tokenizer(folder: Path, named: Path | None, model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """The tokenizer in the folder `named`, or, if None, that of the model's `folder`.

    Raises: DataError where there is none, or one without an end of text or with more tokens than the model.
    """
    places = [folder / TOKENIZER_FOLDER, folder] if named is None else [named]
    place = next((place for place in places if (place / TOKENIZER_FILE).exists()), None)
    if place is None:
        raise DataError(
            f"There is no {TOKENIZER_FILE} in {' or '.join(map(str, places))} (seen from {Path.cwd()}). Name a folder "
            "that has one with --tokenizer, or with tokenizer= in the harness's own command."
        )
    tokenizer = load_pretrained_tokenizer(f"{place}", needs_padding=False)
    if tokenizer.eos_token_id is None:
        raise DataError(f"The tokenizer in {place} names no end-of-text token (eos_token). Use the model's own.")
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise DataError(
            f"The tokenizer in {place} has {len(tokenizer)} tokens, but the model in {folder} knows {num_embeddings}. "
            "Use the model's own."
        )
    return tokenizer


def _from_pretrained(folder: Path) -> PreTrainedModel:
    register_auto_classes()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        kind: Any = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise whatever the first wrong byte leads to
        raise CheckpointError(
            f"{folder} holds no model that can be loaded ({type(error).__name__}: {error})."
        ) from error
