"""LLaVA's JSON: what is read, and what every broken sample is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynmoe_ds.data.conversations import read_conversations
from dynmoe_ds.errors import DataError

QUESTION, ANSWER = {"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "Seven."}


def sample(**values: Any) -> dict[str, Any]:
    return {"id": "a", "image": "one.png", "conversations": [QUESTION, ANSWER]} | values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(b"not decoded here")
    return tmp_path


def write(folder: Path, samples: Any) -> Path:
    file = folder / "train.json"
    file.write_text(json.dumps(samples))
    return file


def test_images_texts_and_order_are_those_of_the_file(folder: Path) -> None:
    two = [{"from": "human", "value": "<image><image> Sum?"}, {"from": "gpt", "value": "9"}]
    text_only = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    samples = [
        sample(),
        sample(id=7, image=["two.png", "one.png"], conversations=two),
        {"conversations": text_only},
        sample(conversations=[ANSWER, QUESTION, ANSWER, {"from": "human", "value": "Sure?"}]),
    ]
    kept, broken = read_conversations(write(folder, samples), folder)
    assert len(broken) == 0
    assert [one.name for one in kept] == ["a", "7", "number 2", "a"]
    assert [[path.name for path in one.images] for one in kept] == [
        ["one.png"],
        ["two.png", "one.png"],
        [],
        ["one.png"],
    ]
    for one, texts in zip(kept, ([QUESTION, ANSWER], two, text_only, [QUESTION, ANSWER]), strict=True):
        assert [(turn.text, turn.is_learned) for turn in one.turns] == [
            (given["value"], given["from"] == "gpt") for given in texts
        ]


def test_a_kind_is_read_and_may_be_absent(folder: Path) -> None:
    kept, _ = read_conversations(write(folder, [sample(kind="sum"), sample(), sample(kind=None)]), folder)
    assert [one.kind for one in kept] == ["sum", None, None]


BROKEN: dict[str, tuple[Any, str]] = {
    "no object": ("text", "a sample is no object: number 0 (str)"),
    "no turns": (sample(conversations=[]), "`conversations` is no list of turns: a"),
    "no text": (sample(conversations=[QUESTION, {"from": "gpt"}]), "a turn has no text in `value`: a"),
    "nobody": (
        sample(conversations=[{"from": "bot", "value": ""}]),
        "a turn is from neither human nor gpt: a ('bot')",
    ),
    "no answer": (sample(conversations=[QUESTION]), "the turns do not alternate between a question and an answer: a"),
    "no question": (sample(conversations=[ANSWER]), "the turns do not alternate"),
    "two answers": (sample(conversations=[QUESTION, ANSWER, ANSWER]), "the turns do not alternate"),
    "missing file": (sample(image="three.png"), "an image is missing: a ("),
    "a number": (sample(image=3), "`image` is neither a path nor a list of paths: a"),
    "no marker": (sample(image=["one.png", "two.png"]), "not one <image> for every image: a (1 for 2)"),
    "kind of no text": (sample(kind=3), "`kind` is no text without slashes: a (3)"),
    "no image": (sample(image=None), "not one <image> for every image: a (1 for 0)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_sample_stops_or_is_counted_and_left_out(case: str, folder: Path) -> None:
    given, words = BROKEN[case]
    good = sample(id="good")
    file = write(folder, [given, good])
    with pytest.raises(DataError) as caught:
        read_conversations(file, folder)
    assert f"1 of 2 samples in {file} cannot be used.\n  - 1 x " in str(caught.value) and words in str(caught.value)
    assert "data.on_broken=skip" in str(caught.value)
    kept, broken = read_conversations(file, folder, "skip")
    assert [one.name for one in kept] == ["good"] and len(broken) == 1 and words in broken.summary()
    with pytest.raises(DataError, match="Nothing is left of it"):
        read_conversations(write(folder, [given]), folder, "skip")


def test_many_broken_samples_are_counted_by_reason_and_a_few_named(folder: Path) -> None:
    samples = [sample(id=f"s{i}", image="three.png") for i in range(5)] + [sample(conversations=[QUESTION]), sample()]
    kept, broken = read_conversations(write(folder, samples), folder, "skip")
    first, second = broken.summary().splitlines()
    assert first.startswith("  - 5 x an image is missing: s0 (") and first.endswith("), ...") and "s3" not in first
    assert second == "  - 1 x the turns do not alternate between a question and an answer: a"
    assert (len(kept), len(broken)) == (1, 6)


@pytest.mark.parametrize(
    ("content", "words"),
    [("[", "is not valid JSON"), ("{}", "must hold a list of samples but holds dict"), ("[]", "has no samples")],
)
def test_other_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(content)
    with pytest.raises(DataError, match=words):
        read_conversations(file, None, "skip")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nobody\.json cannot be read: No such file"):
        read_conversations(tmp_path / "nobody.json", None)
