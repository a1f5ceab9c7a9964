"""The text of a run, from a file or from CPython, as packed training and held-out sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from dynmoe_ds.config.schema import TextDataConfig
from dynmoe_ds.data.rank_zero import from_rank_zero
from dynmoe_ds.data.sequences import TokenSequences, pack
from dynmoe_ds.data.tokenizer import end_of_text_id, train_tokenizer
from dynmoe_ds.errors import DataError

BLOCK_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class TextData:
    """Everything a run reads. `tokenizer_json` is the tokenizer, trained on the training text alone."""

    tokenizer_json: str
    train: TokenSequences
    held_out: TokenSequences

    def tokenizer(self) -> Tokenizer:
        """The tokenizer as an object."""
        return Tokenizer.from_str(self.tokenizer_json)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer().get_vocab_size()

    @property
    def end_of_text(self) -> int:
        """The id that closes every document."""
        return end_of_text_id(self.tokenizer())


def load_text_data(config: TextDataConfig) -> TextData:
    """The text that `config` names, split, tokenised and packed on rank 0 and sent to every rank.

    Only rank 0 needs the file, and all ranks have the same tokenizer and sequences.

    Raises: DataError, on every rank, for text that is missing, unreadable or too short.
    Collective: every rank of the default group.
    """
    return from_rank_zero(lambda: prepare_text(read_text(config), config))


def read_text(config: TextDataConfig) -> str:
    """The whole text as one string.

    `pydoc_topics`: all language-reference topics that come with CPython, in alphabetical order. They differ a little
    between Python versions, so compare losses within one version only.

    Raises: DataError for a file that is missing, unreadable or not UTF-8.
    """
    if config.name == "pydoc_topics":
        return "\n\n".join(topics[name] for name in sorted(topics))
    if config.path is None:
        raise DataError("data.name is 'text_file' but data.path is not set. Set data.path to a UTF-8 text file.")
    path = Path(config.path)
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(
            f"data.path is {str(path)!r} but there is no such file (seen from {Path.cwd()}). "
            "Give the path of a UTF-8 text file."
        ) from None
    except OSError as error:
        raise DataError(
            f"data.path is {str(path)!r} but cannot be read: {error.strerror}. Give the path of a readable text file."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.path is {str(path)!r} but is not UTF-8: byte {error.object[error.start]:#04x} at offset "
            f"{error.start}. Convert it, for example with `iconv -t UTF-8`."
        ) from error


def split_text(text: str, held_out_every: int) -> tuple[list[str], list[str]]:
    """The training and the held-out documents; together they are the whole text.

    The text is cut into blocks of BLOCK_CHARACTERS; the last of every `held_out_every` blocks is held out and the
    blocks before it form one training document.

    Raises: DataError when `held_out_every` leaves no training text, or the text is too short to hold out a block.
    """
    if held_out_every < 2:
        raise DataError(f"data.held_out_every is {held_out_every}, which leaves no text to train on. Use 2 or more.")
    if len(text) <= (held_out_every - 1) * BLOCK_CHARACTERS:
        raise DataError(
            f"The text has {len(text)} characters, but with data.held_out_every={held_out_every} it needs more than "
            f"{(held_out_every - 1) * BLOCK_CHARACTERS} for a held-out part. Use a smaller data.held_out_every "
            "or a longer text."
        )
    train, held_out = [], []
    for start in range(0, len(text), held_out_every * BLOCK_CHARACTERS):
        border = start + (held_out_every - 1) * BLOCK_CHARACTERS
        train.append(text[start:border])
        held_out.append(text[border : border + BLOCK_CHARACTERS])
    return train, [document for document in held_out if document]


def prepare_text(text: str, config: TextDataConfig) -> TextData:
    """`text` split, tokenised and packed, on this rank alone.

    Raises: DataError when the text is too short for one training and one held-out sequence.
    """
    train_documents, held_out_documents = split_text(text, config.held_out_every)
    tokenizer = train_tokenizer(train_documents, config.vocab_size)
    train = pack(train_documents, tokenizer, config.sequence_length)
    held_out = pack(held_out_documents, tokenizer, config.sequence_length)
    parts = {"training": (train_documents, train), "held-out": (held_out_documents, held_out)}
    for name, (documents, sequences) in parts.items():
        if len(sequences) == 0:
            raise DataError(
                f"The {name} part has {sum(map(len, documents))} characters, too few for one sequence of "
                f"data.sequence_length={config.sequence_length} tokens. Use a shorter sequence_length or a longer text."
            )
    return TextData(tokenizer_json=tokenizer.to_str(), train=train, held_out=held_out)
