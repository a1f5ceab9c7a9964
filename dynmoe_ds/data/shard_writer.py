"""Text files to a folder of token shards, in pieces: neither a text nor a shard is ever held whole."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dynmoe_ds.data.shard_index import DTYPES, TOKENIZER_FILE, Shard, ShardIndex
from dynmoe_ds.data.tokenizer import END_OF_TEXT
from dynmoe_ds.errors import DataError

TOKENS_PER_SHARD = 2**27
CHARACTERS_PER_PIECE = 2**18
PIECES_AT_ONCE = 32


def text_pieces(path: Path) -> Iterator[str]:
    """A UTF-8 text file in pieces of about CHARACTERS_PER_PIECE characters that end with a line; line ends are kept.

    Raises: DataError for a file that is missing, unreadable or not UTF-8.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while piece := file.read(CHARACTERS_PER_PIECE):
                yield piece + file.readline()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: {error.reason}. Convert it, for example with `iconv -t UTF-8`."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give the path of a text file.") from error


def write_token_shards(
    files: Sequence[Path],
    folder: Path,
    *,
    tokenizer: Tokenizer,
    held_out_files: Sequence[Path] = (),
    end_of_text: str = END_OF_TEXT,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> ShardIndex:
    """Tokenise text files, each one document closed by `end_of_text`, into a folder that `data=token_shards` reads.

    `files` become the shards `train_00000.bin` and so on, `held_out_files` `held_out_00000.bin` and so on. The folder
    is written aside and appears when it is whole.

    Raises: DataError for a folder that is not empty, a file that cannot be used or is in both lists, a tokenizer
    without the token `end_of_text`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not an empty folder. Choose another one, or move it away.")
    if both := sorted(str(path) for path in {p.resolve() for p in files} & {p.resolve() for p in held_out_files}):
        raise DataError(f"{', '.join(both)} would be trained on and held out. Take it out of one of the lists.")
    end = tokenizer.token_to_id(end_of_text)
    if end is None:
        raise DataError(f"The tokenizer has no token {end_of_text!r}. Name the token that ends a text in it.")
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
        unfinished = Path(aside) / folder.name
        unfinished.mkdir()
        shards: list[Shard] = []
        for prefix, part in {"train": files, "held_out": held_out_files}.items():
            writer = _ShardWriter(unfinished, prefix, DTYPES[dtype], tokens_per_shard)
            for path in part:
                for ids in _token_ids(text_pieces(path), tokenizer):
                    writer.add(ids)
                writer.add([end])
            shards += writer.close()
        index = ShardIndex(dtype=dtype, vocab_size=vocab_size, end_of_text=end, shards=tuple(shards))
        tokenizer.save(str(unfinished / TOKENIZER_FILE))
        index.write(unfinished)
        unfinished.rename(folder)
    return index


def _token_ids(pieces: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each piece; several pieces are encoded at once, on as many threads as there are."""
    pieces = iter(pieces)
    while some := list(islice(pieces, PIECES_AT_ONCE)):
        yield from (encoding.ids for encoding in tokenizer.encode_batch(some, add_special_tokens=False))


class _ShardWriter:
    """A stream of ids into files of `tokens_per_shard` ids each; the last may be shorter."""

    def __init__(self, folder: Path, prefix: str, dtype: np.dtype[Any], tokens_per_shard: int) -> None:
        self._folder, self._prefix, self._dtype, self._tokens_per_shard = folder, prefix, dtype, tokens_per_shard
        self._shards: list[Shard] = []
        self._digest = hashlib.sha256()
        self._num_tokens = 0  # of the shard that is being written

    def add(self, ids: Sequence[int]) -> None:
        """Append ids."""
        array = np.asarray(ids, dtype=self._dtype)
        while len(array):
            part, array = np.split(array, [self._tokens_per_shard - self._num_tokens])
            with open(self._folder / self._name(), "ab") as file:
                file.write(part.tobytes())
            self._digest.update(part.tobytes())
            self._num_tokens += len(part)
            if self._num_tokens == self._tokens_per_shard:
                self._end_shard()

    def close(self) -> list[Shard]:
        """Every shard written."""
        if self._num_tokens:
            self._end_shard()
        return self._shards

    def _end_shard(self) -> None:
        shard = Shard(file=self._name(), num_tokens=self._num_tokens, sha256=self._digest.hexdigest())
        self._shards.append(shard)
        self._digest, self._num_tokens = hashlib.sha256(), 0

    def _name(self) -> str:
        return f"{self._prefix}_{len(self._shards):05d}.bin"
