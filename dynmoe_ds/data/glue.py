"""GLUE from the files of its download: rows of sentences with a label, tokenised and padded batch by batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.config.schema import GlueDataConfig
from dynmoe_ds.data.glue_tasks import GLUE_TASKS, GlueTask
from dynmoe_ds.data.pretrained_tokenizer import load_pretrained_tokenizer
from dynmoe_ds.data.rank_zero import from_rank_zero
from dynmoe_ds.errors import DataError

logger = logging.getLogger(__name__)

_LENGTH_SAMPLE = 1000


class SentenceRow(NamedTuple):
    """One or two sentences, and the index of their class, or their score."""

    sentences: tuple[str, ...]
    label: float


class SentenceExamples:
    """Sentences, or pairs of them, with labels, tokenised when a batch is asked for."""

    def __init__(
        self, rows: Sequence[SentenceRow], tokenizer: PreTrainedTokenizerFast, max_length: int, is_regression: bool
    ) -> None:
        self._sentences = [row.sentences for row in rows]
        self._labels = torch.tensor([row.label for row in rows], dtype=torch.float32 if is_regression else torch.int64)
        self._tokenizer, self._max_length = tokenizer, max_length

    def __len__(self) -> int:
        return len(self._sentences)

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu", epochs: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, if the tokenizer gives them, `token_type_ids`, all [B, L] int64, padded to
        the longest of the batch and cut off at `max_length`; `labels` [B], int64 classes or float32 scores.

        Of a pair that is too long, the longer sentence loses tokens first.
        """
        encoding = self._tokenizer(
            *map(list, zip(*(self._sentences[index] for index in indices), strict=True)),
            truncation=True,
            max_length=self._max_length,
            padding=True,
            return_tensors="pt",
        )
        batch = {**encoding, "labels": self._labels[list(indices)]}
        return {name: value.to(device) for name, value in batch.items()}

    def mean_length(self) -> int:
        """Tokens per example, without padding, estimated from at most 1000 of them."""
        indices = range(0, len(self), -(-len(self) // _LENGTH_SAMPLE))
        return round(int(self.batch(indices)["attention_mask"].sum()) / len(indices))


@dataclass(frozen=True, kw_only=True, slots=True)
class GlueData:
    """One task's examples; `held_out` by the suffix of their metrics, "" first."""

    task: GlueTask
    tokenizer: PreTrainedTokenizerFast
    train: SentenceExamples
    held_out: Mapping[str, SentenceExamples]


def load_glue_data(config: GlueDataConfig) -> GlueData:
    """The task that `config` names, read on rank 0 and sent to every rank.

    Raises: DataError, on every rank, for files that are missing or not in GLUE's format, a tokenizer that cannot be
    used, or a training file of another number of rows than `data.num_train`.
    Collective: every rank of the default group.
    """
    return from_rank_zero(lambda: _read_task(config))


def _read_task(config: GlueDataConfig) -> GlueData:
    task = GLUE_TASKS[config.task]
    if config.path is None:
        raise DataError(
            f"data.path is not set. Set it to the folder of the GLUE download, the one that holds {task.folder}."
        )
    tokenizer = load_pretrained_tokenizer(config.tokenizer)
    folder = Path(config.path) / task.folder

    def examples(name: str) -> SentenceExamples:
        rows = read_rows(folder / name, task)
        return SentenceExamples(rows, tokenizer, config.sequence_length, task.is_regression)

    train = examples("train.tsv")
    if len(train) != config.num_train:
        raise DataError(
            f"data.num_train is {config.num_train} but {folder / 'train.tsv'} has {len(train)} examples. The length of "
            f"an epoch is computed from it: set data.num_train={len(train)}."
        )
    held_out = {suffix: examples(name) for suffix, name in task.held_out.items()}
    return GlueData(task=task, tokenizer=tokenizer, train=train, held_out=held_out)


def read_rows(path: Path, task: GlueTask) -> list[SentenceRow]:
    """All labelled rows of a task's file, in its order.

    Fields are whatever lies between tabs, quote characters included. Lines end with a line feed alone, since sentences
    hold other separators, such as U+0085.

    Raises: DataError, with the file and the line, for a file that is missing or unreadable, a missing column, a row
    with too few or too many columns, a label that the task does not have, or no rows at all.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            lines = ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(file, start=1))
            rows = list(_parse(lines, path, task))
    except FileNotFoundError:
        raise DataError(
            f"There is no file {path} (seen from {Path.cwd()}). Set data.path to the folder of the GLUE download, the "
            f"one that holds {task.folder}."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start} of a block.") from error
    if not rows:
        raise DataError(f"{path} has no examples. Download it again.")
    return rows


def _parse(lines: Iterator[tuple[int, list[str]]], path: Path, task: GlueTask) -> Iterator[SentenceRow]:
    columns = task.columns or tuple(next(lines, (1, []))[1])
    wanted = (*task.sentences, task.label)
    if missing := [name for name in wanted if name not in columns]:
        raise DataError(
            f"{path}, line 1 has no column {', '.join(missing)}; it has {', '.join(columns)}. Use the file of the "
            f"GLUE download, with its header."
        )
    *places, label_place = (columns.index(name) for name in wanted)
    num_skipped = 0
    for number, fields in lines:
        if len(fields) != len(columns):
            if not task.has_broken_rows:
                raise DataError(
                    f"{path}, line {number} has {len(fields)} columns instead of {len(columns)}. Download it again."
                )
            num_skipped += 1
            continue
        label = _label(fields[label_place], task)
        if label is None:
            allowed = " or ".join(task.classes) or "a number"
            raise DataError(f"{path}, line {number} has the label {fields[label_place]!r} instead of {allowed}.")
        yield SentenceRow(tuple(fields[place] for place in places), label)
    if num_skipped:
        logger.warning("%s: skipped %d rows that do not have %d columns.", path, num_skipped, len(columns))


def _label(text: str, task: GlueTask) -> float | None:
    """The index of a class, or a score; None for anything else."""
    if not task.is_regression:
        return task.classes.index(text) if text in task.classes else None
    try:
        score = float(text)
    except ValueError:
        return None
    return score if math.isfinite(score) else None
