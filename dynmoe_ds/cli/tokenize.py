"""`dynmoe tokenize`: text files to a folder of token shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_DEFAULT_VOCAB_SIZE = 32_000

_EXAMPLES = """examples:
  dynmoe tokenize book.txt --out shards
  dynmoe tokenize train/*.txt --held-out valid.txt --vocab-size 32000 --out shards
  dynmoe tokenize more.txt --tokenizer shards/tokenizer.json --out more-shards

exit codes:
  0  done      1  failed      2  a fault in the command or the data      130  interrupted
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "tokenize",
        help="write text files as a folder of token shards for data=token_shards",
        description="Tokenise UTF-8 text files, each one document, into a folder of flat files of token ids with an "
        "index and the tokenizer. Without --tokenizer a byte-level BPE is trained on FILE ..., not on held-out files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a text to train on")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write; new or empty")
    parser.add_argument(
        "--held-out", type=Path, action="append", default=[], metavar="FILE", help="a text to hold out; repeatable"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help=f"tokens of the new tokenizer (default {_DEFAULT_VOCAB_SIZE})"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json to use instead of a new one")
    parser.add_argument(
        "--end-of-text", metavar="TOKEN", help="the token of --tokenizer that ends a text (default <|endoftext|>)"
    )
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="tokens per shard (default 2**27)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and say how to train on it.

    Raises: ConfigError for options that do not go together; DataError for files that cannot be used.
    """
    _check(arguments)
    from dynmoe_ds.data import END_OF_TEXT, write_token_shards
    from dynmoe_ds.data.shard_writer import TOKENS_PER_SHARD, text_pieces
    from dynmoe_ds.data.tokenizer import read_tokenizer, train_tokenizer

    if arguments.tokenizer is None:
        pieces = (piece for path in arguments.files for piece in text_pieces(path))
        tokenizer = train_tokenizer(pieces, arguments.vocab_size or _DEFAULT_VOCAB_SIZE)
    else:
        tokenizer = read_tokenizer(arguments.tokenizer)
    index = write_token_shards(
        arguments.files,
        arguments.out,
        tokenizer=tokenizer,
        held_out_files=arguments.held_out,
        end_of_text=arguments.end_of_text or END_OF_TEXT,
        tokens_per_shard=arguments.shard_tokens or TOKENS_PER_SHARD,
    )
    num_tokens = sum(shard.num_tokens for shard in index.shards)
    print(f"{arguments.out}: {len(index.shards)} shards, {num_tokens} tokens of a vocabulary of {index.vocab_size}")
    held_out = ",".join(shard.file for shard in index.shards if shard.file.startswith("held_out"))
    named = f" data.held_out_windows=null 'data.held_out_shards=[{held_out}]'" if held_out else ""
    print(f"train on it with: dynmoe train data=token_shards data.path={arguments.out}{named}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises: ConfigError with every option that cannot be used."""
    from dynmoe_ds.data.tokenizer import SMALLEST_VOCAB

    faults = []
    if arguments.tokenizer is not None and arguments.vocab_size is not None:
        faults.append("--vocab-size is for a new tokenizer, but --tokenizer names one. Leave one of them out.")
    if arguments.tokenizer is None and arguments.end_of_text is not None:
        faults.append("--end-of-text names a token of --tokenizer, which is not given. Leave it out.")
    if arguments.vocab_size is not None and arguments.vocab_size < SMALLEST_VOCAB:
        faults.append(
            f"--vocab-size is {arguments.vocab_size} but must be at least {SMALLEST_VOCAB}: 256 bytes and the end of "
            "text."
        )
    if arguments.shard_tokens is not None and arguments.shard_tokens < 1:
        faults.append(f"--shard-tokens is {arguments.shard_tokens} but must be at least 1.")
    if faults:
        raise ConfigError(faults)
