"""Models of others as folders that `dynmoe generate`, `evaluate` and `export` take as they take a run's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynmoe_ds.checkpoint.publish import check_vacant
from dynmoe_ds.data import ImageInput, load_pretrained_tokenizer, read_image_statistics
from dynmoe_ds.errors import CheckpointError, ConfigError, DataError
from dynmoe_ds.export import import_published_model, save_model
from dynmoe_ds.export.published import read_published_config
from dynmoe_ds.models import Vocabulary, tokens_per_image
from dynmoe_ds.training.saved_run import MODEL_FOLDER
from dynmoe_ds.training.tasks.vision_language import NORMALISATION, TOKENIZER_FOLDER, vocabulary_of, write_input

_PADDED = "pad"


def import_to_folder(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    vision_tower: str | Path | None,
    tokenizer: str | Path | None,
    template: str,
    text_only: bool,
) -> None:
    """Write the model that `import_published_model` reads from `checkpoint`, with its tokenizer, into a new folder.

    tokenizer: its folder; None for the checkpoint's. template: how a question becomes a prompt, of
    `dynmoe_ds.data.chat`. Raises: as `import_published_model`; DataError for a tokenizer that is missing or not the
    model's; ConfigError for images that the model wants otherwise than padded to a square; CheckpointError for a folder
    that is in use or cannot be written.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    check_vacant(folder)
    told = read_published_config(checkpoint)
    read = _tokenizer(checkpoint if tokenizer is None else Path(tokenizer), told.get("vocab_size"))
    if vision_tower is not None and (form := told.get("image_aspect_ratio")) != _PADDED:
        raise ConfigError(
            f"image_aspect_ratio is {form!r} in {checkpoint}, but images are padded to a square here ({_PADDED!r}). "
            "Read the model with dynmoe_ds.import_published_model, and give it images of your own."
        )
    vocabulary = None if vision_tower is None else vocabulary_of(read, "--tokenizer")
    image_token_id = None if vocabulary is None else vocabulary.image_token_id
    model = import_published_model(checkpoint, vision_tower, text_only=text_only, image_token_id=image_token_id)
    try:
        read.save_pretrained(folder / TOKENIZER_FOLDER)
        if isinstance(model, LlavaForConditionalGeneration):
            assert vocabulary is not None, "a model that sees has a tower"
            write_input(folder, template, _image_input(model, f"{vision_tower}"), vocabulary.image_token_id)
    except OSError as error:
        raise CheckpointError(f"The model cannot be written to {folder}: {error}.") from error
    save_model(model, folder / MODEL_FOLDER)  # last: without it the folder is none of an imported model


def _tokenizer(place: Path, vocab_size: Any) -> PreTrainedTokenizerFast:
    if not (place / "tokenizer.json").exists():
        raise DataError(
            f"{place} has no tokenizer.json: it has no tokenizer, or one that only its authors' code can read. Name "
            "the folder of the base model, in the form of transformers' own tokenizers, as --tokenizer."
        )
    tokenizer = load_pretrained_tokenizer(f"{place}", needs_padding=False, key="--tokenizer")
    known: Vocabulary = vocabulary_of(tokenizer, "--tokenizer")
    last = max(id_ for id_ in tokenizer.get_vocab().values() if id_ != known.image_token_id)
    if isinstance(vocab_size, int) and last >= vocab_size:
        raise DataError(
            f"The tokenizer in {place} has ids up to {last}, but the model knows {vocab_size}. Use the model's own."
        )
    return tokenizer


def _image_input(model: LlavaForConditionalGeneration, vision_tower: str) -> ImageInput:
    vision: Any = model.config.vision_config
    statistics = read_image_statistics(vision_tower, vision.image_size) or NORMALISATION["clip_vision_model"]
    return ImageInput(size=vision.image_size, num_tokens=tokens_per_image(model.config), **asdict(statistics))
