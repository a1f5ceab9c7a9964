"""Folders of token shards, written by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dynmoe_ds.data.shard_index import DTYPES, Shard, ShardIndex


def write_shards(
    folder: Path, shards: Mapping[str, Sequence[int]], *, vocab_size: int = 100, dtype: str = "uint16"
) -> ShardIndex:
    """A folder with these ids by file name; id 0 ends a text. Nothing is checked, so that tests can write faults."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for file, ids in shards.items():
        content = np.asarray(ids, dtype=DTYPES[dtype]).tobytes()
        (folder / file).write_bytes(content)
        listed.append(Shard(file=file, num_tokens=len(ids), sha256=hashlib.sha256(content).hexdigest()))
    index = ShardIndex(dtype=dtype, vocab_size=vocab_size, end_of_text=0, shards=tuple(listed))
    index.write(folder)
    return index
