"""A pretrained tokenizer from local files."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dynmoe_ds.errors import DataError

_PADDING_TOKENS = ("[PAD]", "<pad>")


def load_pretrained_tokenizer(
    path: str | None, needs_padding: bool = True, key: str = "data.tokenizer"
) -> PreTrainedTokenizerFast:
    """The fast tokenizer in a folder that `save_pretrained` wrote, or in a `tokenizer.json`. Nothing is downloaded.

    A `tokenizer.json` says nothing of padding: its token must be [PAD] or <pad>. key: what the user calls `path`.
    Raises: DataError for a path that is not set, does not exist or holds no fast tokenizer, or without a padding token
    where one is needed.
    """
    if path is None:
        raise DataError(f"{key} is not set. Set it to the pretrained model's folder or to its tokenizer.json.")
    place = Path(path)
    if not place.exists():
        raise DataError(
            f"{key} is {path!r} but there is no such file or folder (seen from {Path.cwd()}). Set it to the "
            "pretrained model's folder or to its tokenizer.json."
        )
    try:
        tokenizer = _from_folder(place) if place.is_dir() else _from_file(place)
    except Exception as error:  # the libraries raise whatever the first wrong byte leads to
        raise DataError(f"{key} is {path!r} but holds no tokenizer that can be read: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{key} is {path!r} but {type(tokenizer).__name__} is no fast tokenizer.")
    if needs_padding and tokenizer.pad_token is None:
        raise DataError(f"{key} is {path!r} but names no padding token. Use the folder of a model that pads its input.")
    return tokenizer


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _from_file(file: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_file(str(file))
    padding = next((token for token in _PADDING_TOKENS if tokenizer.token_to_id(token) is not None), None)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=padding)
