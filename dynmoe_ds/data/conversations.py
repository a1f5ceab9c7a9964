"""Conversations about images in LLaVA's JSON: read, checked, and what is broken counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dynmoe_ds.errors import DataError

IMAGE_MARKER = "<image>"
"""Where a text has it, an image stands."""

HUMAN, MODEL = "human", "gpt"
_SHOWN = 3  # broken samples that a message names, of every kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one side says. is_learned: whether it is the model's."""

    text: str
    is_learned: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns of a human and the model, the human's first. images: one for every IMAGE_MARKER in the turns, in order.

    kind: what is asked, in a word of the data set's own, where it says so.
    """

    name: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    kind: str | None = None


@dataclass(kw_only=True, slots=True)
class BrokenSamples:
    """Samples that cannot be used: by what is wrong, the names of the samples and the details."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, sample: str) -> None:
        """Count one. reason: a clause that does not change from sample to sample."""
        self.found.setdefault(reason, []).append(sample)

    def add_all(self, others: BrokenSamples) -> None:
        """Count those of another file too."""
        for reason, samples in others.found.items():
            self.found.setdefault(reason, []).extend(samples)

    def refuse(self, file: str, num_kept: int, on_broken: Literal["skip", "stop"]) -> None:
        """Raises: DataError with all of them if `on_broken` is `stop`, or if nothing was kept."""
        if len(self) == 0 and num_kept == 0:
            raise DataError(f"{file} has no samples.")
        if len(self) and (on_broken == "stop" or num_kept == 0):
            advice = (
                "Repair them, or leave them out with data.on_broken=skip."
                if num_kept
                else "Nothing is left of it. Repair it, or name another file, or the right data.image_folder."
            )
            total = len(self) + num_kept
            raise DataError(f"{len(self)} of {total} samples in {file} cannot be used.\n{self.summary()}\n{advice}")

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    def summary(self) -> str:
        """One line per reason: how many, and the first few."""
        return "\n".join(
            f"  - {len(samples)} x {reason}: {', '.join(samples[:_SHOWN])}{', ...' if len(samples) > _SHOWN else ''}"
            for reason, samples in self.found.items()
        )


def read_conversations(
    file: Path, image_folder: Path | None, on_broken: Literal["skip", "stop"] = "stop"
) -> tuple[list[Conversation], BrokenSamples]:
    """The conversations of a JSON file, in its order, and the samples left out.

    The file is a list of samples: `id`; `image`, absent for text alone, a path below `image_folder` or a list of them;
    `conversations`, a list of turns with `from` (`human` or `gpt`) and `value`; `kind`, a text that may be absent.
    Turns before the human's first one are left out. Every image must exist; whether it can be decoded is found when it
    is needed.

    Raises: DataError for a file that cannot be read or is no such list, without any sample that can be used, and,
    with `on_broken` `stop`, for broken samples, all of which are counted first.
    """
    kept: list[Conversation] = []
    broken = BrokenSamples()
    for number, sample in enumerate(_samples(file)):
        name = str(sample.get("id", f"number {number}")) if isinstance(sample, dict) else f"number {number}"
        try:
            kept.append(_conversation(name, sample, image_folder))
        except _Broken as error:
            broken.add(error.reason, f"{name} ({error.detail})" if error.detail else name)
    broken.refuse(f"{file}", len(kept), on_broken)
    return kept, broken


class _Broken(Exception):
    """A sample that cannot be used."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _samples(file: Path) -> list[Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror} (seen from {Path.cwd()}).") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(found, list):
        raise DataError(f"{file} must hold a list of samples but holds {type(found).__name__}.")
    return found


def _conversation(name: str, sample: Any, image_folder: Path | None) -> Conversation:
    """Raises: _Broken."""
    if not isinstance(sample, dict):
        raise _Broken("a sample is no object", type(sample).__name__)
    turns = tuple(_turns(sample.get("conversations")))
    images = _images(sample.get("image"), image_folder)
    num_markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if num_markers != len(images):
        raise _Broken(f"there is not one {IMAGE_MARKER} for every image", f"{num_markers} for {len(images)}")
    kind = sample.get("kind")
    if kind is not None and (not isinstance(kind, str) or "/" in kind):  # it becomes a part of metric names
        raise _Broken("`kind` is no text without slashes", repr(kind))
    return Conversation(name=name, images=images, turns=turns, kind=kind)


def _turns(given: Any) -> Iterator[Turn]:
    """Raises: _Broken."""
    if not isinstance(given, list) or not given:
        raise _Broken("`conversations` is no list of turns")
    for turn in given:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _Broken("a turn has no text in `value`")
        if turn.get("from") not in (HUMAN, MODEL):
            raise _Broken(f"a turn is from neither {HUMAN} nor {MODEL}", repr(turn.get("from")))
    speakers = [turn["from"] for turn in given]
    first = speakers.index(HUMAN) if HUMAN in speakers else len(given)
    turns = given[first:]
    if len(turns) < 2 or any(turn["from"] != (HUMAN, MODEL)[i % 2] for i, turn in enumerate(turns)):
        raise _Broken("the turns do not alternate between a question and an answer")
    # A question without an answer at the end teaches nothing.
    for turn in turns[: len(turns) // 2 * 2]:
        yield Turn(text=turn["value"], is_learned=turn["from"] == MODEL)


def _images(given: Any, image_folder: Path | None) -> tuple[Path, ...]:
    """Raises: _Broken."""
    names = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Broken("`image` is neither a path nor a list of paths")
    paths = tuple(Path(name) if image_folder is None else image_folder / name for name in names)
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise _Broken("an image is missing", missing[0])
    return paths
