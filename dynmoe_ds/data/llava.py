"""Conversations about images as a model's input: tokens, labels and pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.config.schema import LlavaDataConfig
from dynmoe_ds.data.chat import IGNORED, encode
from dynmoe_ds.data.conversations import BrokenSamples, Conversation, read_conversations
from dynmoe_ds.data.image_folder import read_image
from dynmoe_ds.data.image_transforms import normalised, padded_to_square
from dynmoe_ds.data.order import Grouping
from dynmoe_ds.data.packing import packed_rows
from dynmoe_ds.data.rank_zero import from_rank_zero
from dynmoe_ds.errors import DataError

TEXT_KIND, IMAGE_KIND = "text", "image"
_UNDECODABLE = "an image cannot be decoded"
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
    """A conversation as ids [n] and labels [n] int32, with one image token per image. kind: None or a name.

    The first token is not learned: nothing comes before it, though in a packed row something stands there.
    """

    name: str
    kind: str | None
    images: tuple[Path, ...]
    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class InputForm:
    """How conversations become a model's input. token_kinds: the names that `token_kinds` of a batch stand for."""

    image: ImageInput
    image_token_id: int
    pad_token_id: int
    token_kinds: tuple[str, ...]

    def length(self, sample: Sample) -> int:
        """Tokens of a sample, those of its images included."""
        return len(sample.ids) + len(sample.images) * (self.image.num_tokens - 1)

    def columns(self, row: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, labels and kinds of tokens [L] int64, with all tokens of every image."""
        text, image = (
            np.repeat([self._kind(kind, sample) for sample in row], [len(sample.ids) for sample in row])
            for kind in (TEXT_KIND, IMAGE_KIND)
        )
        ids = np.concatenate([sample.ids for sample in row])
        labels = np.concatenate([sample.labels for sample in row])
        is_image = ids == self.image_token_id
        repeats = torch.from_numpy(np.where(is_image, self.image.num_tokens, 1))
        columns = (ids, labels, np.where(is_image, image, text))
        first, second, third = (torch.from_numpy(column).long().repeat_interleave(repeats) for column in columns)
        return first, second, third

    def positions(self, row: Sequence[Sample], length: int) -> Tensor:
        """[length] int64, from 0 in every sample. The padding at the end is as another sample."""
        lengths = list(map(self.length, row))
        return torch.cat([torch.arange(n) for n in (*lengths, length - sum(lengths))])

    def _kind(self, modality: str, sample: Sample) -> int:
        return self.token_kinds.index(modality if sample.kind is None else f"{modality} {sample.kind}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationJob:
    """What makes a batch, with the samples of its rows alone, so that it can be sent to another process."""

    rows: tuple[tuple[Sample, ...], ...]
    form: InputForm
    is_packed: bool

    def __call__(self) -> dict[str, Tensor]:
        """See `ConversationExamples.batch`. Raises: DataError for an image that cannot be decoded."""
        form, size = self.form, self.form.image.size
        files = [file for row in self.rows for sample in row for file in sample.images]
        with ThreadPoolExecutor(_DECODING_THREADS) as pool:
            images = list(pool.map(lambda file: read_picture(file, form.image), files))
        columns = zip(*map(form.columns, self.rows), strict=True)
        fills = {"input_ids": form.pad_token_id, "labels": IGNORED, "token_kinds": -1}
        batch = {
            name: pad_sequence(list(column), batch_first=True, padding_value=fill)
            for column, (name, fill) in zip(columns, fills.items(), strict=True)
        }
        length = batch["input_ids"].shape[1]
        lengths = torch.tensor([sum(map(form.length, row)) for row in self.rows])
        batch["attention_mask"] = torch.arange(length) < lengths[:, None]
        if self.is_packed:
            batch["packed_positions"] = torch.stack([form.positions(row, length) for row in self.rows])
        batch["pixel_values"] = torch.stack(images or [torch.zeros(3, size, size)])
        return batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationExamples:
    """Conversations by index, or rows of several; images are decoded when a batch is asked for.

    on_broken: what is done about an image that cannot be decoded. rows: the samples of every packed row, by index; None
    where each sample is a row. left_out: the samples that `batch` was asked for and left out so far, in this process.
    """

    samples: tuple[Sample, ...]
    form: InputForm
    on_broken: Literal["skip", "stop"]
    rows: tuple[tuple[int, ...], ...] | None = None
    left_out: BrokenSamples = field(default_factory=BrokenSamples)

    def __len__(self) -> int:
        return len(self.samples if self.rows is None else self.rows)

    @property
    def token_kinds(self) -> tuple[str, ...]:
        return self.form.token_kinds

    def packed(self, row_length: int, seed: int, *, is_grouped: bool) -> ConversationExamples:
        """The same samples in rows of at most `row_length` tokens (`packed_rows`).

        is_grouped: whether a row's samples all have images or none has.
        """
        kinds = [is_grouped and len(sample.images) > 0 for sample in self.samples]
        return replace(self, rows=packed_rows(list(map(self.form.length, self.samples)), kinds, row_length, seed))

    def length(self, index: int) -> int:
        """Tokens of an example, those of its images included."""
        return sum(map(self.form.length, self._row(index)))

    def lengths(self) -> np.ndarray:
        """Of all examples."""
        return np.array([self.length(index) for index in range(len(self))])

    def grouping(self) -> Grouping:
        """By whether there are images, and by length."""
        rows = map(self._row, range(len(self)))
        return Grouping(lengths=self.lengths(), kinds=np.array([any(sample.images for sample in row) for row in rows]))

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu", epochs: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """`input_ids`, `labels`, `token_kinds` [B, L] int64, `attention_mask` [B, L] bool, `pixel_values` [I, 3, H, W].

        L is that of the longest example; the others are padded on the right. Images stand in the order of their tokens.
        Without any, one of the mean colour is there in vain: vision tower and projector take part in every pass. Packed
        rows come with `packed_positions` [B, L] int64, which begin at 0 again where a sample does, and padding. An
        example whose image cannot be decoded is, with `skip`, replaced by the one after it, which is logged and counted
        (`left_out`); held-out ones are looked at when they are loaded. Out of a packed row it is left out, unless
        nothing else is in it.
        Raises: DataError, with `stop`, for such an image, on the rank that reads it.
        """
        try:
            batch = self.job(indices)()
        except DataError:
            if self.on_broken == "stop":
                raise
            batch = self._job(map(self._decodable, indices))()
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def job(self, indices: Sequence[int], epochs: Sequence[int] | None = None) -> ConversationJob:
        return self._job(map(self._row, indices))

    def _job(self, rows: Iterable[tuple[Sample, ...]]) -> ConversationJob:
        return ConversationJob(rows=tuple(rows), form=self.form, is_packed=self.rows is not None)

    def _row(self, index: int) -> tuple[Sample, ...]:
        return tuple(self.samples[i] for i in ((index,) if self.rows is None else self.rows[index]))

    def _decodable(self, index: int) -> tuple[Sample, ...]:
        """The samples of the row at `index` whose images can be decoded, or of the next row that has any."""
        for step in range(len(self)):
            row = self._row((index + step) % len(self))
            is_kept = list(map(self._is_decodable, row))
            if step == 0:  # the others are counted when it is their turn
                for sample in compress(row, (not kept for kept in is_kept)):
                    self.left_out.add(_UNDECODABLE, sample.name)
            if any(is_kept):
                return tuple(compress(row, is_kept))
        raise DataError("No sample has images that can be decoded.")

    def _is_decodable(self, sample: Sample) -> bool:
        try:
            for file in sample.images:
                read_image(file)
        except DataError as error:
            logger.error("Sample %s is left out: %s", sample.name, error)
            return False
        return True


def token_kinds_of(sample_kinds: Iterable[str]) -> tuple[str, ...]:
    """The kinds of tokens: text and image of samples without a kind of their own, then of each kind."""
    suffixes = ["", *(f" {kind}" for kind in sample_kinds)]
    return tuple(f"{modality}{suffix}" for suffix in suffixes for modality in (TEXT_KIND, IMAGE_KIND))


def modality_of(token_kind: str) -> tuple[str, str | None] | None:
    """Modality and kind of sample, where it has one, of a kind of `token_kinds_of`; None for any other."""
    modality, _, sample_kind = token_kind.partition(" ")
    return (modality, sample_kind or None) if modality in (TEXT_KIND, IMAGE_KIND) else None


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
                broken.add("no answer has a token to learn", sample.name)
            elif is_held_out and (file_name := _undecodable(sample)):
                broken.add(_UNDECODABLE, f"{sample.name} ({file_name})")
            else:
                samples.append(sample)
        broken.refuse(f"{file}", len(samples), config.on_broken)
        all_broken.add_all(broken)
        parts.append(samples)
    if len(all_broken):
        logger.warning("%d samples are left out.\n%s", len(all_broken), all_broken.summary())
    kinds = sorted({sample.kind for part in parts for sample in part if sample.kind is not None})
    form = InputForm(
        image=image, image_token_id=image_token_id, pad_token_id=pad_token_id, token_kinds=token_kinds_of(kinds)
    )
    train, held_out = (
        ConversationExamples(samples=tuple(part), form=form, on_broken=config.on_broken) for part in parts
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
    labels = np.array(tokens.labels, np.int32)
    labels[:1] = IGNORED
    return Sample(
        name=conversation.name,
        kind=conversation.kind,
        images=conversation.images,
        ids=np.array(tokens.input_ids, np.int32),
        labels=labels,
    )
