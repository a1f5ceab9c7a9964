"""`index.json` of a folder of token shards: what the folder holds.

A folder holds the index, the shards that it lists (little-endian ids and nothing else) and, if there is one, the
`tokenizer.json` that made them:

    {"dtype": "uint16", "vocab_size": 32000, "end_of_text": 0,
     "shards": [{"file": "train_00000.bin", "num_tokens": 134217728, "sha256": "..."}]}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe_ds.errors import DataError

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
WRITE_AGAIN = "Write the folder again with `dynmoe tokenize`."


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of token ids. `sha256` is of its bytes, in hexadecimal."""

    file: str
    num_tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """What `index.json` says. Every id is below `vocab_size`; `end_of_text` closes every document."""

    dtype: str
    vocab_size: int
    end_of_text: int
    shards: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        """Write `index.json`."""
        (folder / INDEX_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_index(folder: Path) -> ShardIndex:
    """The folder's `index.json`.

    Raises: DataError where it is missing, no JSON, or lacks something.
    """
    path = folder / INDEX_FILE
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing, so {folder} is no folder of token shards (seen from {Path.cwd()}). Write one with "
            "`dynmoe tokenize`."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. {WRITE_AGAIN}") from error
    if fault := _index_fault(plain):
        raise DataError(f"{path} {fault}. {WRITE_AGAIN}")
    shards = tuple(Shard(**shard) for shard in plain.pop("shards"))
    return ShardIndex(**plain, shards=shards)


def _index_fault(plain: Any) -> str | None:
    """What is wrong with the content of an index, in words."""
    if not isinstance(plain, dict) or set(plain) != {"dtype", "vocab_size", "end_of_text", "shards"}:
        return "must be an object with the keys dtype, vocab_size, end_of_text and shards"
    if plain["dtype"] not in DTYPES:
        return f"has the dtype {plain['dtype']!r}, but ids are {' or '.join(DTYPES)}"
    vocab_size, end = plain["vocab_size"], plain["end_of_text"]
    if type(vocab_size) is not int or type(end) is not int or not 0 <= end < vocab_size:
        return f"has end_of_text {end!r} and vocab_size {vocab_size!r}, but must have 0 <= end_of_text < vocab_size"
    shards = plain["shards"]
    if not isinstance(shards, list) or not shards:
        return "lists no shards"
    for shard in shards:
        if not isinstance(shard, dict) or set(shard) != {"file", "num_tokens", "sha256"}:
            return f"has the shard {shard!r}, but a shard is an object with the keys file, num_tokens and sha256"
        is_name = isinstance(shard["file"], str) and Path(shard["file"]).name == shard["file"]
        if not is_name or not isinstance(shard["sha256"], str):
            return f"has the shard {shard!r}, but file must be a name without folders and sha256 text"
        if type(shard["num_tokens"]) is not int or shard["num_tokens"] < 1:
            return f"says that {shard['file']} has {shard['num_tokens']!r} tokens, but a shard has at least 1"
    return None
