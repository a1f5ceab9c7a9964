"""`dynmoe data`: data sets in the formats of others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_EXAMPLES = """examples:
  dynmoe data index books/*.txt --tokenizer shards/tokenizer.json --out corpus/books
  dynmoe data index web.jsonl --json-key content --tokenizer models/llama --out corpus/web

exit codes:
  0  done      1  failed      2  a fault in the command or the data      130  interrupted
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its own verbs to the command's parser."""
    parser = verbs.add_parser("data", help="write data sets in the formats of others: `dynmoe data index`")
    inner = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    index = inner.add_parser(
        "index",
        help="write texts as an indexed data set of Megatron for data=megatron_indexed",
        description="Tokenise UTF-8 texts into PREFIX.bin and PREFIX.idx. Every line of a .jsonl file is a document, "
        "and every other file is one; each is closed by the tokenizer's end of text. `dynmoe tokenize` writes this "
        "project's own format instead, which needs no megatron-core, and can train a tokenizer.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    index.add_argument("files", nargs="+", type=Path, metavar="TEXT", help="a text, or JSON lines (.jsonl)")
    index.add_argument(
        "--tokenizer", required=True, metavar="FOLDER", help="a tokenizer's folder, or its tokenizer.json"
    )
    index.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="what to write, without .bin and .idx")
    index.add_argument("--json-key", default="text", metavar="KEY", help="where JSON lines have text (default text)")
    index.set_defaults(run=run_index)


def run_index(arguments: argparse.Namespace) -> int:
    """Write the data set and say how to train on it.

    Raises: ConfigError without megatron-core; DataError for files that cannot be used.
    """
    from dynmoe_ds.data.megatron_indexed import read_vocabulary
    from dynmoe_ds.data.megatron_writer import read_documents, write_indexed_dataset

    vocabulary = read_vocabulary(arguments.tokenizer, key="--tokenizer")
    documents = read_documents(arguments.files, arguments.json_key)
    counts = write_indexed_dataset(documents, arguments.out, vocabulary)
    print(
        f"{arguments.out}: {counts.num_documents} documents, {counts.num_tokens} tokens of a vocabulary of "
        f"{vocabulary.size}"
    )
    print(
        f"train on it with: dynmoe train data=megatron_indexed 'data.paths=[{arguments.out}]' "
        f"data.tokenizer={arguments.tokenizer}"
    )
    return 0
