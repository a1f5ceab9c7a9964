"""Conversations about images as a model's input: tokens, labels and pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.config.schema import LlavaDataConfig
from dynmoe_ds.data.chat import IGNORED, encode
from dynmoe_ds.data.conversations import BrokenSamples, Conversation, read_conversations
from dynmoe_ds.data.image_folder import read_image
from dynmoe_ds.data.image_transforms import normalised, padded_to_square
from dynmoe_ds.data.order import Grouping
from dynmoe_ds.data.rank_zero import from_rank_zero
from dynmoe_ds.errors import DataError

TEXT_KIND, IMAGE_KIND = "text", "image"
_DECODING_THREADS = 4  # PIL decodes outside of Python's lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInput:
    """How a vision tower wants images: `size` pixels wide and high, with the given mean and deviation per channel.

    num_tokens: how many tokens of the text one image takes the place of. resample: how it is resized, PIL's number.
    """

    size: int
    num_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = Image.Resampling.BICUBIC


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A conversation as ids [n] and labels [n] int32, with one image token per image. kind: None or a name."""

    name: str
    kind: str | None
    images: tuple[Path, ...]
    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationExamples:
    """Conversations by index; images are decoded when a batch is asked for.

    token_kinds: the names that `token_kinds` of a batch stand for. on_broken: what is done about an image that cannot
    be decoded.
    """

    samples: tuple[Sample, ...]
    image: ImageInput
    image_token_id: int
    pad_token_id: int
    token_kinds: tuple[str, ...]
    on_broken: Literal["skip", "stop"]

    def __len__(self) -> int:
        return len(self.samples)

    def length(self, index: int) -> int:
        """Tokens of an example, those of its images included."""
        sample = self.samples[index]
        return len(sample.ids) + len(sample.images) * (self.image.num_tokens - 1)

    def grouping(self) -> Grouping:
        """By whether there are images, and by length."""
        return Grouping(
            lengths=np.array([self.length(index) for index in range(len(self))]),
            kinds=np.array([len(sample.images) > 0 for sample in self.samples]),
        )

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu", epochs: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `token_kinds` [B, L] int64, `attention_mask` [B, L] bool, `pixel_values` [I, 3, H, W].

        L is that of the longest example; the others are padded on the right. Images stand in the order of their tokens.
        Without any, one of the mean colour is there in vain: vision tower and projector take part in every pass. An
        example whose image cannot be decoded is, with `skip`, replaced by the one after it, which is logged; held-out
        ones are looked at when they are loaded.
        Raises: DataError, with `stop`, for such an image, on the rank that reads it.
        """
        with ThreadPoolExecutor(_DECODING_THREADS) as pool:
            given = list(pool.map(self._readable, indices))
        rows = [self._row(sample) for sample, _ in given]
        length = max(len(ids) for ids, _, _ in rows)
        fills = (self.pad_token_id, IGNORED, -1)
        columns = [
            torch.stack([torch.nn.functional.pad(row[i], (0, length - len(row[i])), value=fill) for row in rows])
            for i, fill in enumerate(fills)
        ]
        lengths = torch.tensor([len(ids) for ids, _, _ in rows])
        images = [image for _, pictures in given for image in pictures]
        pixels = torch.stack(images or [torch.zeros(3, self.image.size, self.image.size)])
        batch = dict(zip(("input_ids", "labels", "token_kinds"), columns, strict=True))
        batch |= {"attention_mask": torch.arange(length) < lengths[:, None], "pixel_values": pixels}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def _row(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, labels and kinds of tokens [L] int64, with all tokens of every image."""
        is_image = sample.ids == self.image_token_id
        repeats = np.where(is_image, self.image.num_tokens, 1)
        suffix = f" {sample.kind}" if sample.kind is not None else ""
        text, image = (self.token_kinds.index(f"{kind}{suffix}") for kind in (TEXT_KIND, IMAGE_KIND))
        columns = (sample.ids, sample.labels, np.where(is_image, image, text))
        ids, labels, kinds = (torch.from_numpy(np.repeat(column, repeats).astype(np.int64)) for column in columns)
        return ids, labels, kinds

    def _readable(self, index: int) -> tuple[Sample, list[Tensor]]:
        """The sample at `index`, or the next one whose images can be decoded, with its images [3, H, W]."""
        for step in range(len(self)):
            sample = self.samples[(index + step) % len(self)]
            try:
                return sample, [read_picture(file, self.image) for file in sample.images]
            except DataError as error:
                if self.on_broken == "stop":
                    raise
                logger.error("Sample %s is left out: %s", sample.name, error)
        raise DataError("No sample has images that can be decoded.")


def read_picture(file: Path, wanted: ImageInput) -> Tensor:
    """[3, H, W] float32: the whole image in a square, as a tower wants it. Raises: DataError if it cannot be read."""
    # Rounded down, as LLaVA's code and transformers' processor do.
    square = padded_to_square(read_image(file), tuple(int(255 * value) for value in wanted.mean))
    resized = square.resize((wanted.size, wanted.size), Image.Resampling(wanted.resample))
    return normalised(resized, wanted.mean, wanted.std)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationData:
    """The conversations of a run, and those left out."""

    train: ConversationExamples
    held_out: ConversationExamples
    broken: BrokenSamples


def load_conversations(
    config: LlavaDataConfig,
    tokenizer: PreTrainedTokenizerFast,
    image: ImageInput,
    image_token_id: int,
    pad_token_id: int,
) -> ConversationData:
    """The conversations that `config` names, read and tokenised on rank 0 and sent to every rank.

    Collective: every rank. Raises: DataError, on every rank, for files that cannot be used, a template that the
    tokenizer lacks, and, with `on_broken` `stop`, for broken samples.
    """
    return from_rank_zero(lambda: _load(config, tokenizer, image, image_token_id, pad_token_id))


def _load(
    config: LlavaDataConfig,
    tokenizer: PreTrainedTokenizerFast,
    image: ImageInput,
    image_token_id: int,
    pad_token_id: int,
) -> ConversationData:
    assert config.path is not None and config.held_out_path is not None, "checked with the configuration"
    folder = None if config.image_folder is None else Path(config.image_folder)
    all_broken = BrokenSamples()
    parts: list[list[Sample]] = []
    for is_held_out, file in enumerate((Path(config.path), Path(config.held_out_path))):
        conversations, broken = read_conversations(file, folder, config.on_broken)
        samples = []
        for conversation in conversations:
            sample = _encoded(conversation, tokenizer, config.template, image_token_id)
            length = len(sample.ids) + len(sample.images) * (image.num_tokens - 1)
            if length > config.sequence_length:
                broken.add(f"longer than data.sequence_length ({config.sequence_length})", f"{sample.name} ({length})")
            elif (sample.labels == IGNORED).all():
                broken.add("no answer has a token", sample.name)
            elif is_held_out and (file_name := _undecodable(sample)):
                broken.add("an image cannot be decoded", f"{sample.name} ({file_name})")
            else:
                samples.append(sample)
        broken.refuse(f"{file}", len(samples), config.on_broken)
        all_broken.add_all(broken)
        parts.append(samples)
    if len(all_broken):
        logger.warning("%d samples are left out.\n%s", len(all_broken), all_broken.summary())
    kinds = sorted({sample.kind for part in parts for sample in part if sample.kind is not None})
    suffixes = ["", *(f" {kind}" for kind in kinds)]
    token_kinds = tuple(f"{kind}{suffix}" for suffix in suffixes for kind in (TEXT_KIND, IMAGE_KIND))
    train, held_out = (
        ConversationExamples(
            samples=tuple(part),
            image=image,
            image_token_id=image_token_id,
            pad_token_id=pad_token_id,
            token_kinds=token_kinds,
            on_broken=config.on_broken,
        )
        for part in parts
    )
    return ConversationData(train=train, held_out=held_out, broken=all_broken)


def _undecodable(sample: Sample) -> Path | None:
    """The first image that cannot be decoded: in evaluation none may give its place to another."""
    for file in sample.images:
        try:
            read_image(file)
        except DataError:
            return file
    return None


def _encoded(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast, template: str, image_token_id: int
) -> Sample:
    tokens = encode(conversation, tokenizer, template, image_token_id=image_token_id, tokens_per_image=1)
    return Sample(
        name=conversation.name,
        kind=conversation.kind,
        images=conversation.images,
        ids=np.array(tokens.input_ids, np.int32),
        labels=np.array(tokens.labels, np.int32),
    )
