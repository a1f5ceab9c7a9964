"""Questions about real handwritten digits, in LLaVA's JSON: a vision-language data set that needs no download.

The pictures are scikit-learn's 1797 scans of handwritten digits, the questions and answers are words.
`python -m dynmoe_ds.data.digit_questions FOLDER` writes the folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.checkpoint.publish import published
from dynmoe_ds.data.conversations import HUMAN, IMAGE_MARKER, MODEL
from dynmoe_ds.errors import DataError, DynMoEError

logger = logging.getLogger(__name__)

KINDS = ("which", "parity", "larger", "sum", "text")
"""What is asked: the digit of a scan, whether it is even, the larger of two scans, their sum, and without a picture."""

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
"""The sums of two digits, in words."""

PIXELS_PER_SCAN = 16
"""Width and height of a scan in a picture."""

_PICTURE_KINDS = KINDS[:-1]
_NUM_SCANS = {"which": 1, "parity": 1, "larger": 2, "sum": 2}
_FOLLOWED_BY = {"which": "parity", "parity": "which", "larger": "sum", "sum": "larger"}
_PHRASINGS = {
    "which": ("Which digit is this?", "What digit do you see?", "Name the digit."),
    "parity": ("Is this digit even or odd?", "Is the digit you see odd or even?", "Even or odd?"),
    "larger": ("Which of the two digits is larger?", "What is the larger digit?", "Name the larger of the two digits."),
    "sum": ("What is the sum of the two digits?", "What do the two digits add up to?", "Add the two digits."),
}
_TEXT_PHRASINGS = {
    "parity": ("Is {0} even or odd?", "Is {0} odd or even?"),
    "larger": ("Which is larger, {0} or {1}?", "Name the larger of {0} and {1}."),
    "sum": ("What is {0} plus {1}?", "Add {0} and {1}."),
}
_ANSWERS = (*NUMBERS, "even", "odd", "equal")

_SCAN_WIDTH = 8  # pixels, in scikit-learn
_WHITE = 16  # the largest of scikit-learn's grey levels
_HELD_OUT_EVERY = 5  # of the scans, in random order, this one is held out

_PAD, _UNKNOWN, _END = "<pad>", "<unk>", "</s>"
_QUESTION, _ANSWER = "Q:", "A:"
_WORD = r"[?.,]|[^\s?.,]+"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    f"{{% else %}}{_QUESTION} {{{{ message.content }}}}\n"
    # An answer's beginning is not the answer's: with it here, the text up to a question stays as it was when the answer
    # is added.
    f"{{% if add_generation_prompt or not loop.last %}}{_ANSWER} {{% endif %}}"
    "{% endif %}{% endfor %}"
)


def write_digit_questions(folder: Path, *, num_train: int, num_held_out: int, seed: int = 0) -> None:
    """Write `train.json`, `held_out.json`, their pictures in `images` and a `tokenizer` folder, or nothing at all.

    A sample has LLaVA's keys `id`, `image` (below `images`; absent in text alone) and `conversations`, and `kind`, one
    of KINDS. A picture is one scan, 16 x 16 grey pixels, or two side by side, 32 x 16. Held-out samples show scans that
    no training sample shows, ask one question each, and have every kind equally often (the first of KINDS once more
    where their number is not divisible). Of the training samples a tenth is text alone, and a fifth asks two questions
    about its picture; `kind` is then that of the first. Text alone has few questions, so both files share many.

    The files are a function of the arguments. The tokenizer does not depend on them at all; see `digit_tokenizer`.
    Raises: DataError for a number of samples below 1, a negative seed, a folder that is in use or cannot be written,
    or without scikit-learn.
    """
    _check_numbers(num_train, num_held_out, seed)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not an empty folder. Choose another one, or move it away.")
    scans, digits = _load_scans()
    order = np.random.default_rng(seed).permutation(len(digits))
    is_held_out = np.arange(len(order)) % _HELD_OUT_EVERY == 0
    train, held_out = order[~is_held_out], order[is_held_out]
    # A stream each, so that the number of training samples does not change what is asked of the held-out ones. Not
    # [seed, 0]: numpy takes it for the seed alone.
    ask = _Asking(scans[train], digits[train], np.random.default_rng([seed, 1]))
    ask_held_out = _Asking(scans[held_out], digits[held_out], np.random.default_rng([seed, 2]))
    try:
        with published(folder) as unfinished:
            images = unfinished / "images"
            images.mkdir()
            # Numbers go on from one file to the other: names of samples and pictures are unique in both together.
            samples = [ask.sample(i, kinds, images) for i, kinds in enumerate(_training_kinds(num_train))]
            _write(samples, unfinished / "train.json")
            kinds_of = enumerate(_held_out_kinds(num_held_out), num_train)
            _write([ask_held_out.sample(i, kinds, images) for i, kinds in kinds_of], unfinished / "held_out.json")
            digit_tokenizer().save_pretrained(unfinished / "tokenizer")
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error


def _check_numbers(num_train: int, num_held_out: int, seed: int) -> None:
    """Raises: DataError."""
    for what, number in (("training", num_train), ("held-out", num_held_out)):
        if number < 1:
            raise DataError(f"The number of {what} samples is {number} but must be at least 1.")
    if seed < 0:
        raise DataError(f"The seed is {seed} but must be at least 0.")


def _write(samples: list[dict[str, Any]], file: Path) -> None:
    file.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word and punctuation mark that a question or an answer can have, and the special ones.

    <pad>, <unk>, </s> as EOS, and <image>. A line's end is read as a space; apart from that decoding gives back the
    text. Its chat template is `Q: question`, a line's end, `A: answer</s>`.
    """
    words = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    found = {word for text in _every_text() for word, _ in words.pre_tokenize_str(text)}
    names = (_PAD, _UNKNOWN, _END, IMAGE_MARKER, *sorted(found))
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = words
    # Spaces between words, but none before punctuation and the end.
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Replace(f" {_END}", _END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        additional_special_tokens=[IMAGE_MARKER],
        chat_template=_CHAT_TEMPLATE,
    )


def _every_text() -> Iterator[str]:
    """Every question, every answer and the template's own words."""
    yield from (_QUESTION, _ANSWER, *_ANSWERS)
    yield from chain.from_iterable(_PHRASINGS.values())
    for phrasing, digits in product(chain.from_iterable(_TEXT_PHRASINGS.values()), product(NUMBERS[:10], repeat=2)):
        yield phrasing.format(*digits)


def _load_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Scans [1797, 16, 16] with 0 black and 255 white, and their digits [1797].

    Raises: DataError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "The handwritten digits come with scikit-learn, which is not installed. Use `pip install scikit-learn`."
        ) from error
    found = load_digits()
    times = PIXELS_PER_SCAN // _SCAN_WIDTH
    scans = np.rint(found.images * (255 / _WHITE)).astype(np.uint8)
    return scans.repeat(times, axis=1).repeat(times, axis=2), found.target


def _training_kinds(num_samples: int) -> Iterator[tuple[str, ...]]:
    """The kinds of question of each sample: every tenth is text, the others take turns, every fifth asks two."""
    for i in range(num_samples):
        if i % 10 == 9:
            yield ("text",)
            continue
        kind = _PICTURE_KINDS[(i - i // 10) % len(_PICTURE_KINDS)]
        yield (kind, _FOLLOWED_BY[kind]) if i % 5 == 0 else (kind,)


def _held_out_kinds(num_samples: int) -> Iterator[tuple[str, ...]]:
    return ((KINDS[i % len(KINDS)],) for i in range(num_samples))


class _Asking:
    """Samples about scans [N, 16, 16] and their digits [N], drawn one after the other."""

    def __init__(self, scans: NDArray[np.uint8], digits: NDArray[np.int64], generator: np.random.Generator) -> None:
        self._scans, self._digits, self._generator = scans, digits, generator

    def sample(self, number: int, kinds: Sequence[str], images: Path) -> dict[str, Any]:
        """A sample with a question of each of the kinds; its picture, if it has one, is written to `images`."""
        name = f"{kinds[0]}-{number:06d}"
        if kinds[0] == "text":
            return {"id": name, "kind": "text", "conversations": _turns(self._text_question())}
        shown = self._generator.choice(len(self._digits), _NUM_SCANS[kinds[0]], replace=False)
        picture = np.concatenate(self._scans[shown], axis=1)
        Image.fromarray(picture).save(images / f"{name}.png")
        digits = self._digits[shown].tolist()
        turns = [turn for kind in kinds for turn in _turns((self._one_of(_PHRASINGS[kind]), _answer(kind, digits)))]
        turns[0]["value"] = f"{IMAGE_MARKER}\n{turns[0]['value']}"
        return {"id": name, "image": f"{name}.png", "kind": kinds[0], "conversations": turns}

    def _text_question(self) -> tuple[str, str]:
        kind = self._one_of(tuple(_TEXT_PHRASINGS))
        digits = self._generator.integers(10, size=2).tolist()
        question = self._one_of(_TEXT_PHRASINGS[kind]).format(*(NUMBERS[digit] for digit in digits))
        return question, _answer(kind, digits)

    def _one_of(self, texts: Sequence[str]) -> str:
        return texts[int(self._generator.integers(len(texts)))]


def _turns(pair: tuple[str, str]) -> list[dict[str, str]]:
    question, answer = pair
    return [{"from": HUMAN, "value": question}, {"from": MODEL, "value": answer}]


def _answer(kind: str, digits: Sequence[int]) -> str:
    """In one word. Of one digit it is the first that is asked about."""
    if kind == "which":
        return NUMBERS[digits[0]]
    if kind == "parity":
        return ("even", "odd")[digits[0] % 2]
    if kind == "larger":
        return NUMBERS[max(digits)] if digits[0] != digits[1] else "equal"
    assert kind == "sum", f"no answer to a question of the kind {kind}"
    return NUMBERS[sum(digits)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for a user's fault."""
    parser = argparse.ArgumentParser(
        prog="python -m dynmoe_ds.data.digit_questions",
        description="Write questions about handwritten digits in LLaVA's JSON, with pictures and a tokenizer.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to write; new or empty")
    parser.add_argument("--train", type=int, default=6000, metavar="N", help="training samples (default 6000)")
    parser.add_argument("--held-out", type=int, default=800, metavar="N", help="held-out samples (default 800)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="what the samples depend on (default 0)")
    given = parser.parse_args(argv)
    try:
        write_digit_questions(given.folder, num_train=given.train, num_held_out=given.held_out, seed=given.seed)
    except DynMoEError as error:
        logger.error("dynmoe: %s", error)
        return 2
    logger.info(
        "%s: %d training samples, %d held out, pictures and a tokenizer", given.folder, given.train, given.held_out
    )
    return 0


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    sys.exit(main())
