"""A model of text and its tokenizer from whatever folder of this project, or of Hugging Face, they are in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dynmoe_ds.data import load_pretrained_tokenizer
from dynmoe_ds.errors import DataError
from dynmoe_ds.export import load_model
from dynmoe_ds.export.hugging_face import HUGGING_FACE_FILE
from dynmoe_ds.export.manifest import MANIFEST_FILE, WEIGHTS_FILE
from dynmoe_ds.moe import moe_layers, watch_padding
from dynmoe_ds.telemetry.run_folder import CONFIG_FILE
from dynmoe_ds.training.saved_run import SavedRun, is_hugging_face, is_imported

TOKENIZER_FILE = "tokenizer.json"


def check_model_folder(folder: Path) -> None:
    """Raises: DataError for a folder that `load_model_folder` knows nothing of."""
    is_run = any((place / CONFIG_FILE).exists() for place in (folder, *folder.absolute().parents[:2]))
    is_model = is_imported(folder) or _is_saved_model(folder) or is_hugging_face(folder)
    if not is_run and not is_model:
        raise DataError(
            f"{folder} has no {CONFIG_FILE}, {MANIFEST_FILE} or {HUGGING_FACE_FILE} (seen from {Path.cwd()}). Name the "
            "folder of a run, one of `dynmoe export`, or another model in Hugging Face's format."
        )


def load_model_folder(
    folder: Path, tokenizer: Path | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model that `SavedRun` or `load_model` reads there, and its tokenizer.

    The model is in evaluation mode; its layers know their names, and padding by its `attention_mask`. tokenizer: its
    folder, None for the model's own. device: None, or CUDA where there is none, takes the accelerator if there is one.
    Nothing is downloaded.

    Raises: DataError for a folder of another kind, and for a tokenizer that is missing or not the model's; as
    `SavedRun`; CheckpointError for a model that cannot be loaded.
    """
    check_model_folder(folder)
    if _is_saved_model(folder):
        model, own = load_model(folder), folder
        watch_padding(model)
        for name, layer in moe_layers(model).items():
            layer.name = name
    else:
        run = SavedRun(folder)
        model, own = run.model, run.tokenizer_folder
    # The harness's own command says cuda:0 where the user says nothing.
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if found is None else found.type
    placed: Any = model.to(device)
    return placed.eval(), _tokenizer(tokenizer or own, model, folder)


def _is_saved_model(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).exists() and (folder / WEIGHTS_FILE).exists()


def _tokenizer(place: Path, model: PreTrainedModel, folder: Path) -> PreTrainedTokenizerFast:
    if not (place / TOKENIZER_FILE).exists():
        raise DataError(
            f"There is no {TOKENIZER_FILE} in {place} (seen from {Path.cwd()}). Name a folder that has one with "
            "--tokenizer, or with tokenizer= in the harness's own command."
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
