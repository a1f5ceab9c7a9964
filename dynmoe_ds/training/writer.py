"""Text by the model of a finished run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from dynmoe_ds.data import ImageInput, load_pretrained_tokenizer, read_picture
from dynmoe_ds.data.chat import encode_prompt
from dynmoe_ds.data.conversations import IMAGE_MARKER
from dynmoe_ds.data.processor import llava_processor
from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.training.saved_run import SavedRun
from dynmoe_ds.training.tasks.vision_language import INPUT_FILE


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a model is asked: `text`, with `<image>` where an image stands; `images`, their files in that order."""

    text: str
    images: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionForm:
    """How questions and images become input of a vision-language model."""

    template: Literal["plain", "vicuna", "own"]
    image: ImageInput
    image_token_id: int


class Writer:
    """Lets the model of a run write: a decoder goes on with a text, a vision-language model answers.

    form: None for a model of text. Raises: DataError for a run without its tokenizer, a vision-language model without
    the file that says how it is asked, or a damaged one.
    """

    def __init__(self, run: SavedRun) -> None:
        if not any(run.tokenizer_folder.glob("tokenizer*")):
            raise DataError(f"{run.folder} has no tokenizer: without it, text is nothing to its model.")
        self._run = run
        self.tokenizer: PreTrainedTokenizerFast = load_pretrained_tokenizer(
            f"{run.tokenizer_folder}", needs_padding=False
        )
        self.form = _image_input(run.folder / INPUT_FILE)
        if self.form is None and isinstance(run.model, LlavaForConditionalGeneration):
            raise DataError(
                f"{run.folder} has no {INPUT_FILE}, which says how questions and images become input of its "
                "vision-language model. `dynmoe export` and training write it beside the model."
            )

    def write(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """What the model writes after each prompt, up to its end-of-text token; all prompts in one batch.

        temperature: 0 takes the likeliest token. Raises: ConfigError for no prompt, images that the model cannot see,
        and prompts with another number of `<image>` than of images; DataError for an image that cannot be read.
        """
        if not prompts:
            raise ConfigError("There is no prompt.")
        rows = [self._ids(prompt) for prompt in prompts]
        length = max(map(len, rows))
        end = self.tokenizer.eos_token_id
        pad = end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        # On the left, so that what is written follows the prompt.
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        files = [file for prompt in prompts for file in prompt.images]
        device = next(self._run.model.parameters()).device
        batch: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if files and self.form is not None:
            batch["pixel_values"] = torch.stack([read_picture(file, self.form.image) for file in files]).to(device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        torch.manual_seed(seed)
        model: Any = self._run.model
        written = model.generate(
            **batch, **sampling, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=end, use_cache=True
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in written[:, length:]]

    def processor(self) -> LlavaProcessor | None:
        """Transformers' processor that makes the same of prompts and images; None for a model of text.

        Raises: DataError for a tokenizer that cannot have the model's image token.
        """
        if self.form is None:
            return None
        config: Any = self._run.model.config
        return llava_processor(
            self.tokenizer,
            self.form.image,
            self.form.template,
            image_token_id=self.form.image_token_id,
            patch_size=config.vision_config.patch_size,
            feature_strategy=config.vision_feature_select_strategy,
        )

    def _ids(self, prompt: Prompt) -> list[int]:
        num_markers = prompt.text.count(IMAGE_MARKER)
        if self.form is None:
            if prompt.images:
                raise ConfigError(f"{self._run.folder} holds a model of text, which sees no images.")
            ids: list[int] = self.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        elif num_markers != len(prompt.images):
            raise ConfigError(
                f"The prompt {prompt.text!r} has {num_markers} {IMAGE_MARKER} for {len(prompt.images)} images. Write "
                "one for each."
            )
        else:
            ids = encode_prompt(
                prompt.text,
                self.tokenizer,
                self.form.template,
                image_token_id=self.form.image_token_id,
                tokens_per_image=self.form.image.num_tokens,
            )
        if not ids:
            raise ConfigError(f"The prompt {prompt.text!r} has no token. Write something to begin with.")
        return ids


def _image_input(file: Path) -> QuestionForm | None:
    """None without the file: for a model of text. Raises: DataError for a damaged one."""
    if not file.exists():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        image = ImageInput(
            size=told["image_size"],
            num_tokens=told["tokens_per_image"],
            mean=tuple(told["mean"]),
            std=tuple(told["std"]),
            resample=told.get("resample", Image.Resampling.BICUBIC),  # what all images were resized with before
        )
        return QuestionForm(template=told["template"], image=image, image_token_id=told["image_token_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} cannot be used ({type(error).__name__}: {error}): it is damaged, or of another version."
        ) from error
