"""Texts to an indexed data set of Megatron (.bin and .idx), one document after the other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from dynmoe_ds.data.megatron_indexed import Vocabulary
from dynmoe_ds.data.shard_writer import text_pieces
from dynmoe_ds.errors import DataError
from dynmoe_ds.integrations.megatron import megatron_module

DOCUMENTS_AT_ONCE = 256
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedCounts:
    """What was written."""

    num_documents: int
    num_tokens: int


def read_documents(files: Sequence[Path], json_key: str) -> Iterator[str]:
    """The documents of some files: each line of JSON lines (.jsonl) is one, under `json_key`; any other file is one.

    Raises: DataError for a file that cannot be read or is not UTF-8, and a line without the key.
    """
    for path in files:
        if path.suffix in JSON_LINES:
            yield from _json_lines(path, json_key)
        else:
            yield "".join(text_pieces(path))


def _json_lines(path: Path, key: str) -> Iterator[str]:
    # Not splitlines(): text in JSON may hold other characters that end a line.
    lines = (line for piece in text_pieces(path) for line in piece.removesuffix("\n").split("\n"))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[key]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DataError(
                f"{path} has no text under {key!r} in line {number}: {line[:80]!r}. Every line must be a JSON object "
                "with it; --json-key names another one."
            )
        yield text


def write_indexed_dataset(documents: Iterable[str], prefix: Path, vocabulary: Vocabulary) -> IndexedCounts:
    """Write `prefix`.bin and `prefix`.idx, every document closed by the end of text. Empty documents are left out.

    Both files are written aside. The index appears last, and without it nothing reads the other: what an interruption
    leaves is never taken for a data set.

    Raises: ConfigError without megatron-core; DataError for files that are there already, and where there is no text.
    """
    module = megatron_module("datasets.indexed_dataset", "dynmoe data index")
    target = {ending: prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx")}
    if there := [str(path) for path in target.values() if path.exists()]:
        raise DataError(f"{' and '.join(there)} exists already. Choose another --out, or move it away.")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{prefix.name}-", dir=prefix.parent) as aside:
        unfinished = {ending: Path(aside) / path.name for ending, path in target.items()}
        dtype = module.DType.optimal_dtype(vocabulary.size)
        builder = module.IndexedDatasetBuilder(str(unfinished[".bin"]), dtype=dtype)
        num_documents = num_tokens = 0
        for ids in _token_ids(documents, vocabulary):
            builder.add_document(np.array(ids, dtype=dtype), [len(ids)])
            num_documents, num_tokens = num_documents + 1, num_tokens + len(ids)
        if num_documents == 0:
            raise DataError(f"There is no text to write to {prefix}: all files are empty.")
        builder.finalize(str(unfinished[".idx"]))
        for ending in (".bin", ".idx"):
            unfinished[ending].rename(target[ending])
    return IndexedCounts(num_documents=num_documents, num_tokens=num_tokens)


def _token_ids(documents: Iterable[str], vocabulary: Vocabulary) -> Iterator[list[int]]:
    """The ids of each document with its end; several are encoded at once, on as many threads as there are."""
    tokenizer, rest = vocabulary.tokenizer.backend_tokenizer, iter(documents)
    while some := list(islice(rest, DOCUMENTS_AT_ONCE)):
        for encoding in tokenizer.encode_batch(some, add_special_tokens=False):
            if encoding.ids:
                yield [*encoding.ids, vocabulary.end_of_text]
