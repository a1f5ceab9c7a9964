"""Megatron's indexed data sets (.bin and .idx), blended. Reading and cutting them is megatron-core's."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.config.schema import MegatronIndexedConfig
from dynmoe_ds.data.faults import raise_faults_of_all_ranks
from dynmoe_ds.data.pretrained_tokenizer import load_pretrained_tokenizer
from dynmoe_ds.data.tokenizer import END_OF_TEXT
from dynmoe_ds.distributed import attempt_together
from dynmoe_ds.errors import DataError
from dynmoe_ds.integrations.megatron import megatron_module

TOKENS_PER_READ = 2**22
NEEDED_FOR = "data.name megatron_indexed"
# In what order documents are put end to end; the run's seed decides in what order windows are read.
CUT_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What an indexed data set does not say: its tokenizer, how many ids that has, and the one that ends a text."""

    tokenizer: PreTrainedTokenizerFast
    size: int
    end_of_text: int


class BlendedWindows:
    """N windows of L tokens per epoch, from several data sets.

    datasets: megatron-core's GPTDatasets, each shuffled and one pass long. shares: of the windows of an epoch, above 0
    and in any unit; None for one pass over each. An epoch has as many windows as all data sets together. A data set
    that gives fewer of them than it has goes on in the next epoch where it stopped in this one, and one that gives
    more starts again: each of its windows is read once before any is read again.
    """

    def __init__(self, datasets: Sequence[Any], length: int, shares: Sequence[float] | None = None) -> None:
        self.length = length
        self._datasets = list(datasets)
        self._sizes = np.array([len(dataset) for dataset in datasets])
        self._dataset_of, self._turn_of = _blend(self._sizes, shares)
        self._per_epoch = np.bincount(self._dataset_of, minlength=len(datasets))

    def __len__(self) -> int:
        return len(self._dataset_of)

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu", epochs: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """`input_ids` and `labels`, both [len(indices), L] int64 and equal: the model shifts the labels itself."""
        passes = [0] * len(indices) if epochs is None else epochs
        windows = [self._window(index, epoch) for index, epoch in zip(indices, passes, strict=True)]
        tokens = torch.stack(windows).to(device)
        return {"input_ids": tokens, "labels": tokens}

    def _window(self, index: int, epoch: int) -> Tensor:
        """The ids [L] int64 of one window of an epoch."""
        chosen = int(self._dataset_of[index])
        number = epoch * int(self._per_epoch[chosen]) + int(self._turn_of[index])
        window: Tensor = self._datasets[chosen][number % int(self._sizes[chosen])]["tokens"]
        return window


def _blend(sizes: np.ndarray, shares: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Which data set each window of an epoch is from [N] int16, and how many of its came before [N] int64."""
    helpers = megatron_module("datasets.helpers", NEEDED_FOR)
    num_windows = int(sizes.sum())
    dataset_of, turn_of = np.zeros(num_windows, dtype=np.int16), np.zeros(num_windows, dtype=np.int64)
    if shares is None:
        helpers.build_exhaustive_blending_indices(dataset_of, turn_of, sizes.tolist(), len(sizes))
    else:
        normalized = [share / sum(shares) for share in shares]
        helpers.build_blending_indices(dataset_of, turn_of, normalized, len(sizes), num_windows, False)
    return dataset_of, turn_of


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronIndexedData:
    """Everything a run reads from indexed data sets."""

    vocabulary: Vocabulary
    train: BlendedWindows
    held_out: BlendedWindows

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def end_of_text(self) -> int:
        return self.vocabulary.end_of_text

    def tokenizer(self) -> Tokenizer:
        """The tokenizer as an object."""
        return self.vocabulary.tokenizer.backend_tokenizer


def read_vocabulary(tokenizer: str | None, key: str = "data.tokenizer") -> Vocabulary:
    """The vocabulary of a tokenizer's folder or file. key: what the user calls `tokenizer`.

    Raises: DataError for a tokenizer that cannot be read, or does not say which token ends a text.
    """
    found = load_pretrained_tokenizer(tokenizer, needs_padding=False, key=key)
    vocab = found.get_vocab()
    end = found.eos_token_id if found.eos_token_id is not None else vocab.get(END_OF_TEXT)
    if end is None:
        raise DataError(
            f"{key} is {tokenizer!r}, which names no token that ends a text (eos_token) and has no {END_OF_TEXT}. Use "
            "the folder of the tokenizer, whose tokenizer_config.json names it."
        )
    return Vocabulary(tokenizer=found, size=max(vocab.values()) + 1, end_of_text=int(end))


def load_megatron_indexed(config: MegatronIndexedConfig) -> MegatronIndexedData:
    """The windows of the data sets that `config` names, checked.

    Every byte is read once before training, each rank a share: the format does not say how many ids there are, and an
    id outside the vocabulary would end the run much later. Every rank keeps an index of its own, of 22 bytes a window.

    Raises: ConfigError without megatron-core; DataError, the same on every rank, for files that are missing, damaged,
    of another vocabulary or too short. Collective: every rank of the default group.
    """
    vocabulary, low_level = _open_all(config)
    for path, indexed in zip(config.paths, low_level, strict=True):
        raise_faults_of_all_ranks(_id_faults(path, indexed, vocabulary.size))
    split = _dataset_config(config, config.paths[0], vocabulary).split_matrix
    raise_faults_of_all_ranks(_length_faults(config, low_level, split))
    parts = [_cut(config, path, vocabulary) for path in config.paths]
    train, held_out = (
        BlendedWindows(datasets, config.sequence_length, config.weights or None)
        for datasets in zip(*parts, strict=True)
    )
    return MegatronIndexedData(vocabulary=vocabulary, train=train, held_out=held_out)


def _open_all(config: MegatronIndexedConfig) -> tuple[Vocabulary, list[Any]]:
    """The vocabulary and an IndexedDataset per path. Raises, collective: as `load_megatron_indexed`."""
    module, vocabulary = attempt_together(
        lambda: (megatron_module("datasets.indexed_dataset", NEEDED_FOR), read_vocabulary(config.tokenizer))
    )
    low_level, faults = [], []
    for path in config.paths:
        try:
            low_level.append(_open(module, path))
        except DataError as failure:
            faults.append(str(failure))
    raise_faults_of_all_ranks(faults)
    return vocabulary, low_level


def _open(module: Any, path: str) -> Any:
    """The IndexedDataset of a path. Raises: DataError for files that are missing or do not belong together."""
    again = "Copy both files, or write them again with `dynmoe data index`."
    for ending in (".idx", ".bin"):
        if not Path(path + ending).is_file():
            raise DataError(f"{path}{ending} is missing (seen from {Path.cwd()}), so {path} cannot be read. {again}")
    if Path(path + ".bin").stat().st_size == 0:
        raise DataError(f"{path}.bin is empty. {again}")
    try:
        indexed = module.IndexedDataset(path)
    except (AssertionError, ValueError, AttributeError, KeyError, OSError) as error:
        raise DataError(f"{path}.idx is no index of Megatron's: {error}. {again}") from error
    expected = int(indexed.sequence_lengths.sum(dtype=np.int64)) * np.dtype(indexed.index.dtype).itemsize
    actual = Path(path + ".bin").stat().st_size
    if actual != expected:
        raise DataError(f"{path}.bin has {actual} bytes but {path}.idx says {expected}. {again}")
    return indexed


def _id_faults(path: str, indexed: Any, vocab_size: int) -> list[str]:
    """What is wrong with this rank's share of the ids of a data set."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tokens = np.memmap(path + ".bin", dtype=indexed.index.dtype, mode="r")
    first, last = (len(tokens) * part // world_size for part in (rank, rank + 1))
    for start in range(first, last, TOKENS_PER_READ):
        part = tokens[start : min(start + TOKENS_PER_READ, last)]
        is_outside = (part < 0) | (part >= vocab_size)
        if is_outside.any():
            at = int(is_outside.argmax())
            return [
                f"{path}.bin holds the id {part[at]} at token {start + at}, but data.tokenizer has {vocab_size} ids. "
                "Name the tokenizer that made the data."
            ]
    return []


def _length_faults(config: MegatronIndexedConfig, low_level: Sequence[Any], split: Sequence[Any]) -> list[str]:
    """Data sets of which a part has no window, by megatron-core's own arithmetic of splits."""
    faults = []
    for path, indexed in zip(config.paths, low_level, strict=True):
        lengths = indexed.sequence_lengths
        for what, part in zip(("training", "held-out"), split, strict=False):
            first, last = (round(border * float(len(lengths))) for border in part)
            num_tokens = int(lengths[first:last].sum(dtype=np.int64))
            if num_tokens < config.sequence_length:
                faults.append(
                    f"{path} has {len(lengths)} documents, of which {last - first} with {num_tokens} tokens are its "
                    f"{what} part, too few for a window of data.sequence_length={config.sequence_length}. Use a "
                    "shorter data.sequence_length or another data.held_out_fraction, or leave the data set out."
                )
    return faults


def _dataset_config(config: MegatronIndexedConfig, path: str, vocabulary: Vocabulary) -> Any:
    module = megatron_module("datasets.gpt_dataset", NEEDED_FOR)
    return module.GPTDatasetConfig(
        random_seed=CUT_SEED,
        sequence_length=config.sequence_length,
        blend=([path], None),
        split=f"{1 - config.held_out_fraction:.9f},{config.held_out_fraction:.9f},0",
        # In memory: a cache on disk is written without care for a crash, and other hosts need not see it.
        path_to_cache="",
        tokenizer=SimpleNamespace(vocab_size=vocabulary.size, eod=vocabulary.end_of_text, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        # The model shifts labels itself, so a window is L tokens and shares none with the next.
        add_extra_token_to_sequence=False,
    )


def _cut(config: MegatronIndexedConfig, path: str, vocabulary: Vocabulary) -> tuple[Any, Any]:
    """The GPTDatasets of the training and the held-out part. Collective: every rank of the default group."""
    gpt = megatron_module("datasets.gpt_dataset", NEEDED_FOR)
    builder = megatron_module("datasets.blended_megatron_dataset_builder", NEEDED_FOR)
    settings = _dataset_config(config, path, vocabulary)
    with _without_warnings(gpt.logger):
        train, held_out, _ = builder.BlendedMegatronDatasetBuilder(
            gpt.GPTDataset, [None, None, None], lambda: True, settings
        ).build()
    return train, held_out


@contextmanager
def _without_warnings(logger: logging.Logger) -> Iterator[None]:
    """Keep megatron-core from warning that nothing is cached, which is meant."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
