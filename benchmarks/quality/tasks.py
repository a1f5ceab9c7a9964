"""The two data sets: CPython's own documentation, and handwritten digits with questions of graded difficulty.

Each is split in three: what a model trains on, what settings are chosen on (`select`), and what they are judged by
(`judge`), which plays no part in any choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.model import HIDDEN_SIZE
from dynmoe_ds.config.schema import TextDataConfig
from dynmoe_ds.data.sequences import pack
from dynmoe_ds.data.text import read_text, split_text
from dynmoe_ds.data.tokenizer import train_tokenizer

Batch = dict[str, Tensor]
SPLITS = ("select", "judge")


class Task(ABC):
    """name: for tables. kinds: names of the token kinds whose mean k is reported. steps: of a run, unless told."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    is_causal: ClassVar[bool]
    steps: ClassVar[int]
    max_length: int
    num_classes: int

    @abstractmethod
    def embedding(self) -> nn.Module: ...

    @abstractmethod
    def training_batch(self, seed: int, step: int) -> Batch:
        """`inputs`-named tensors, `targets` [B, L] with -100 where nothing is asked, and `kinds` [B, L]."""

    @abstractmethod
    def held_out(self, split: str) -> list[Batch]: ...

    def tokens_per_step(self) -> int:
        return self.training_batch(0, 0)["targets"].numel()


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy [B, L] float32, 0 where the target is -100."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def inputs_of(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in ("targets", "kinds")}


class TextEmbedding(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, HIDDEN_SIZE)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)


class TextTask(Task):
    """Next-token prediction on `pydoc_data.topics`: byte-level BPE of 512 tokens, sequences of 128.

    500 steps are 3 epochs. In 1,000 models with 16 experts learn the text by heart: their held-out loss rises again.

    Every fifth block of 2,000 characters is held out; the held-out blocks go to `select` and `judge` in turn.
    """

    name = "text"
    kinds = ()
    is_causal = True
    steps = 500
    max_length = 128
    num_classes = 512
    batch_size = 8

    @cached_property
    def _sequences(self) -> dict[str, Tensor]:
        config = TextDataConfig(
            name="pydoc_topics", vocab_size=self.num_classes, sequence_length=self.max_length + 1, held_out_every=5
        )
        train, held_out = split_text(read_text(config), config.held_out_every)
        tokenizer = train_tokenizer(train, config.vocab_size)
        parts = {"train": train, "select": held_out[::2], "judge": held_out[1::2]}
        return {name: pack(part, tokenizer, config.sequence_length).tokens.long() for name, part in parts.items()}

    def embedding(self) -> nn.Module:
        return TextEmbedding(self.num_classes)

    def training_batch(self, seed: int, step: int) -> Batch:
        sequences = self._sequences["train"]
        per_epoch = len(sequences) // self.batch_size
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(sequences))
        return self._batch(sequences[order[position * self.batch_size :][: self.batch_size]])

    def held_out(self, split: str) -> list[Batch]:
        sequences = self._sequences[split]
        return [self._batch(part) for part in sequences.split(4 * self.batch_size)]

    @staticmethod
    def _batch(sequences: Tensor) -> Batch:
        return {
            "input_ids": sequences[:, :-1],
            "targets": sequences[:, 1:],
            "kinds": torch.full_like(sequences[:, 1:], -1),
        }


class DigitsEmbedding(nn.Module):
    def __init__(self, num_questions: int, pixels_per_patch: int) -> None:
        super().__init__()
        self.questions = nn.Embedding(num_questions, HIDDEN_SIZE)
        self.patches = nn.Linear(pixels_per_patch, HIDDEN_SIZE)

    def forward(self, questions: Tensor, patches: Tensor) -> Tensor:
        return torch.cat([self.questions(questions)[:, None], self.patches(patches)], 1)


class DigitsTask(Task):
    """Two scans of scikit-learn's handwritten digits and a question: name the left one, is it even, or their sum.

    The question is the first token and gives the answer, over one set of 10 + 2 + 19 classes; the 2 x 4 others are
    patches of 4 x 4 pixels. 1,297 scans train, 250 are for `select`, 250 for `judge`; pairs never cross the border.
    Every pixel, of 17 shades between -1 and 1, gets normal noise, drawn anew for every pair: without it models learn
    the 1,297 scans by heart, and a few odd scans among the held-out ones decide.
    """

    name = "digits"
    questions = ("name", "even", "add")
    kinds = (*(f"{q}/question" for q in questions), *(f"{q}/patch" for q in questions))
    is_causal = False
    steps = 1000
    max_length = 9
    num_classes = 31
    batch_size = 96
    held_out_pairs = 1024
    pixel_noise = 0.5

    @cached_property
    def _scans(self) -> dict[str, tuple[Tensor, Tensor]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        images = torch.tensor(digits.images[order], dtype=torch.float32) / 8 - 1
        labels = torch.tensor(digits.target[order])
        borders = {"train": slice(0, 1297), "select": slice(1297, 1547), "judge": slice(1547, 1797)}
        return {name: (images[part], labels[part]) for name, part in borders.items()}

    def embedding(self) -> nn.Module:
        return DigitsEmbedding(len(self.questions), 16)

    def training_batch(self, seed: int, step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        pairs = rng.integers(len(self._scans["train"][1]), size=(self.batch_size, 2))
        return self._batch("train", pairs, rng.integers(len(self.questions), size=self.batch_size), rng)

    def held_out(self, split: str) -> list[Batch]:
        """The same pairs for every question, not the same noise."""
        rng = np.random.default_rng(1)
        pairs = rng.integers(len(self._scans[split][1]), size=(self.held_out_pairs, 2))
        batches = []
        for question in range(len(self.questions)):
            for part in np.array_split(pairs, 4):
                batches.append(self._batch(split, part, np.full(len(part), question), rng))
        return batches

    def _batch(self, split: str, pairs: np.ndarray, questions: np.ndarray, rng: np.random.Generator) -> Batch:
        images, labels = self._scans[split]
        asked = torch.as_tensor(questions)
        left, right = (labels[pairs[:, side]] for side in (0, 1))
        answers = torch.stack([left, 10 + left % 2, 12 + left + right], 1)
        targets = torch.full((len(pairs), self.max_length), -100)
        targets[:, 0] = answers.gather(1, asked[:, None])[:, 0]
        shown = images[torch.as_tensor(pairs)]
        shown = shown + self.pixel_noise * torch.as_tensor(rng.standard_normal(shown.shape, dtype=np.float32))
        patches = shown.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(pairs), 8, 16)
        kinds = torch.full((len(pairs), self.max_length), 0) + asked[:, None]
        kinds[:, 1:] += len(self.questions)
        return {"questions": asked, "patches": patches, "targets": targets, "kinds": kinds}


TASKS: dict[str, type[Task]] = {task.name: task for task in (TextTask, DigitsTask)}
