"""Pre-tokenised text: the shards of a folder, read where they lie and never loaded whole."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from dynmoe_ds.config.schema import TokenShardsConfig
from dynmoe_ds.data.faults import raise_faults_of_all_ranks
from dynmoe_ds.data.rank_zero import from_rank_zero
from dynmoe_ds.data.shard_index import DTYPES, INDEX_FILE, TOKENIZER_FILE, WRITE_AGAIN, Shard, ShardIndex, read_index
from dynmoe_ds.data.tokenizer import read_tokenizer
from dynmoe_ds.errors import DataError

logger = logging.getLogger(__name__)

TOKENS_PER_READ = 2**22


class TokenWindows:
    """N windows of L tokens of some shards, in the shards' order.

    A shard is cut from its start, and no window spans two: its last tokens that fill no window are left out.
    shards: one-dimensional arrays of ids, which may be memory maps. windows: which of all windows; None takes all.
    """

    def __init__(self, shards: Sequence[np.ndarray], length: int, windows: range | None = None) -> None:
        self.length = length
        self._shards = list(shards)
        self._first_windows = np.cumsum([0, *(len(shard) // length for shard in shards)])
        self._windows = range(int(self._first_windows[-1])) if windows is None else windows

    def __len__(self) -> int:
        return len(self._windows)

    def without_last(self, num_windows: int) -> tuple[TokenWindows, TokenWindows]:
        """All windows but the last `num_windows`, and these."""
        border = max(len(self) - num_windows, 0)
        parts = (self._windows[:border], self._windows[border:])
        first, last = (TokenWindows(self._shards, self.length, part) for part in parts)
        return first, last

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu", epochs: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """`input_ids` and `labels`, both [len(indices), L] int64 and equal: the model shifts the labels itself."""
        tokens = np.stack([self._window(self._windows[index]) for index in indices]).astype(np.int64)
        on_device = torch.from_numpy(tokens).to(device)
        return {"input_ids": on_device, "labels": on_device}

    def _window(self, number: int) -> np.ndarray:
        """The ids [L] of one of all windows."""
        shard = int(np.searchsorted(self._first_windows, number, side="right")) - 1
        start = (number - int(self._first_windows[shard])) * self.length
        return self._shards[shard][start : start + self.length]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenShardData:
    """Everything a run reads from a folder of shards. `tokenizer_json` is None where the folder has none."""

    vocab_size: int
    end_of_text: int
    tokenizer_json: str | None
    train: TokenWindows
    held_out: TokenWindows

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer as an object."""
        return None if self.tokenizer_json is None else Tokenizer.from_str(self.tokenizer_json)


def load_token_shards(config: TokenShardsConfig) -> TokenShardData:
    """The windows of the folder that `config` names, checked.

    Every rank maps all shards. Every byte is read once before training, each rank a share of the shards: a wrong id
    would end the run much later, on a GPU without a word about where it came from.

    Raises: DataError, the same on every rank, that names the file: an index that is missing or wrong, a shard that is
    missing or of another size or content than the index says, an id outside the vocabulary, too few tokens.
    Collective: every rank of the default group.
    """
    assert config.path is not None, "find_faults refuses a path of null"
    folder = Path(config.path)
    index, tokenizer_json = from_rank_zero(lambda: _read_descriptions(folder))
    arrays, faults = _map_shards(folder, index)
    raise_faults_of_all_ranks(faults)
    _check_content(folder, index, arrays)
    train, held_out = _split(config, folder, index, arrays)
    return TokenShardData(
        vocab_size=index.vocab_size,
        end_of_text=index.end_of_text,
        tokenizer_json=tokenizer_json,
        train=train,
        held_out=held_out,
    )


def _read_descriptions(folder: Path) -> tuple[ShardIndex, str | None]:
    """The index and the tokenizer's JSON, which must fit together."""
    index = read_index(folder)
    path = folder / TOKENIZER_FILE
    if not path.exists():
        return index, None
    tokenizer = read_tokenizer(path)
    num_ids, end = tokenizer.get_vocab_size(), tokenizer.id_to_token(index.end_of_text)
    if num_ids > index.vocab_size or end is None:
        raise DataError(
            f"{path} has {num_ids} tokens and for id {index.end_of_text} {end!r}, which does not fit {INDEX_FILE} "
            f"(vocab_size {index.vocab_size}, end_of_text {index.end_of_text}). {WRITE_AGAIN}"
        )
    return index, tokenizer.to_str()


def _map_shards(folder: Path, index: ShardIndex) -> tuple[list[np.ndarray], list[str]]:
    """A memory map per shard, and a sentence per shard that is not there as the index says."""
    dtype = DTYPES[index.dtype]
    arrays: list[np.ndarray] = []
    faults: list[str] = []
    for shard in index.shards:
        path = folder / shard.file
        expected = shard.num_tokens * dtype.itemsize
        try:
            size = path.stat().st_size
            if size == expected:
                arrays.append(np.memmap(path, dtype=dtype, mode="r"))
            else:
                faults.append(
                    f"{path} has {size} bytes but {INDEX_FILE} says {expected} ({shard.num_tokens} tokens of "
                    f"{index.dtype}). Copy or write it again."
                )
        except OSError as error:
            faults.append(f"{path} is listed in {INDEX_FILE} but cannot be read: {error.strerror}. Copy it here.")
    return arrays, faults


def _check_content(folder: Path, index: ShardIndex, arrays: Sequence[np.ndarray]) -> None:
    """Read every shard once, each rank its share, one round of shards after the other.

    A message after every round keeps the ranks together: on a slow disk the whole would take longer than a rank waits.

    Collective: every rank of the default group. Raises: DataError, the same on every rank.
    """
    is_alone = not dist.is_initialized()
    rank, world_size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    if rank == 0:
        logger.info("Checking %.2f GB of token shards in %s", sum(array.nbytes for array in arrays) / 1e9, folder)
    for first in range(0, len(arrays), world_size):
        mine = first + rank
        faults = [] if mine >= len(arrays) else _content_faults(folder, index, index.shards[mine], arrays[mine])
        raise_faults_of_all_ranks(faults)


def _content_faults(folder: Path, index: ShardIndex, shard: Shard, tokens: np.ndarray) -> list[str]:
    """What is wrong inside one shard, in at most one sentence."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), TOKENS_PER_READ):
        part = tokens[start : start + TOKENS_PER_READ]
        digest.update(part.tobytes())
        if part.max() >= index.vocab_size:
            at = start + int(part.argmax())
            return [
                f"{folder / shard.file} holds the id {tokens[at]} at token {at}, but the vocabulary of {INDEX_FILE} "
                f"has {index.vocab_size}. {WRITE_AGAIN}"
            ]
    if digest.hexdigest() != shard.sha256:
        return [f"{folder / shard.file} is not the file whose sha256 is in {INDEX_FILE}. Copy or write it again."]
    return []


def _split(
    config: TokenShardsConfig, folder: Path, index: ShardIndex, arrays: Sequence[np.ndarray]
) -> tuple[TokenWindows, TokenWindows]:
    """The training and the held-out windows.

    Raises: DataError for a held-out shard that is not listed, and where a part has no window.
    """
    names = [shard.file for shard in index.shards]
    if unknown := [name for name in config.held_out_shards if name not in names]:
        raise DataError(
            f"data.held_out_shards names {', '.join(unknown)}, but {folder / INDEX_FILE} lists {', '.join(names)}."
        )
    if config.held_out_shards:
        parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
        for name, array in zip(names, arrays, strict=True):
            parts[name in config.held_out_shards].append(array)
        train, held_out = (TokenWindows(part, config.sequence_length) for part in parts.values())
    else:
        assert config.held_out_windows is not None, "find_faults refuses a configuration that holds out nothing"
        train, held_out = TokenWindows(arrays, config.sequence_length).without_last(config.held_out_windows)
    for what, part in {"training": train, "held-out": held_out}.items():
        if len(part) == 0:
            raise DataError(
                f"{folder} has no {what} window of data.sequence_length={config.sequence_length} tokens "
                f"({len(train)} for training, {len(held_out)} held out). Use a shorter data.sequence_length, hold out "
                "less, or write more text."
            )
    return train, held_out
