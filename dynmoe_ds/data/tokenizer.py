"""A byte-level BPE tokenizer, trained on the training text alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.errors import DataError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # one token per byte, and the end of text


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, END_OF_TEXT included; any text survives encode and decode.

    The same documents in the same order give the same tokenizer. Few documents can give fewer tokens than asked for.

    Raises: DataError when `vocab_size` cannot hold one token per byte and END_OF_TEXT.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"data.vocab_size is {vocab_size} but a byte-level tokenizer needs at least {SMALLEST_VOCAB} "
            f"(256 bytes and {END_OF_TEXT}). Use {SMALLEST_VOCAB} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of END_OF_TEXT in a tokenizer that `train_tokenizer` made."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None, f"the tokenizer has no {END_OF_TEXT}"
    return end


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises: DataError for a file that cannot be read or is no tokenizer.
    """
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers package raises bare Exception for JSON that is no tokenizer
        raise DataError(f"{path} is no tokenizer: {error}. Give the path of a tokenizer.json.") from error


def save_tokenizer(tokenizer: Tokenizer, folder: Path, end_of_text: str = END_OF_TEXT) -> None:
    """Write the files into `folder` from which `PreTrainedTokenizerFast.from_pretrained` reads the tokenizer."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end_of_text, eos_token=end_of_text, pad_token=end_of_text
    )
    fast.save_pretrained(folder)
