"""Questions about handwritten digits: what is shown and asked, that the answers are right, and the tokenizer."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.data.chat import IGNORED, encode
from dynmoe_ds.data.conversations import Conversation, Turn, read_conversations
from dynmoe_ds.data.digit_questions import KINDS, main, write_digit_questions
from dynmoe_ds.data.pretrained_tokenizer import load_pretrained_tokenizer
from dynmoe_ds.errors import DataError

NUM_TRAIN, NUM_HELD_OUT = 400, 100
IMAGE_ID, PER_IMAGE = 999, 3
WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "questions"
    write_digit_questions(folder, num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT)
    return folder


@pytest.fixture(scope="module")
def tokenizer(written: Path) -> PreTrainedTokenizerFast:
    return load_pretrained_tokenizer(str(written / "tokenizer"))


@pytest.fixture(scope="module")
def scan_of_pixels() -> dict[bytes, int]:
    """The index of each of scikit-learn's scans by its 8 x 8 grey levels."""
    found = {scan.astype(np.uint8).tobytes(): i for i, scan in enumerate(load_digits().images)}
    assert len(found) == 1797  # no two are alike, so that a scan is known by its pixels
    return found


def samples(folder: Path, part: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{part}.json").read_text())


def scans_shown(folder: Path, sample: dict[str, Any], scan_of_pixels: dict[bytes, int]) -> list[int]:
    """The indices of the scans in a sample's picture, from left to right."""
    if "image" not in sample:
        return []
    picture = Image.open(folder / "images" / sample["image"])
    assert picture.mode == "L" and picture.height == 16 and picture.width in (16, 32)
    levels = np.rint(np.asarray(picture)[::2, ::2] * (16 / 255)).astype(np.uint8)
    return [scan_of_pixels[half.tobytes()] for half in np.split(levels, picture.width // 16, axis=1)]


def expected_answer(question: str, digits: list[int]) -> str:
    """By the words of the question. digits: those of the picture; without one they are in the question."""
    digits = digits or [WORDS.index(word) for word in re.findall(r"\w+", question) if word in WORDS]
    if re.search(r"\b(plus|add|sum)\b", question.lower()):
        first, second = digits
        return WORDS[first + second]
    if "larger" in question:
        first, second = digits
        return "equal" if first == second else WORDS[first if first > second else second]
    (digit,) = digits
    if "even" in question.lower():
        return "even" if digit in (0, 2, 4, 6, 8) else "odd"
    assert "digit" in question
    return WORDS[digit]


def test_held_out_samples_show_scans_that_no_training_sample_shows(
    written: Path, scan_of_pixels: dict[bytes, int]
) -> None:
    train, held_out = (
        {scan for sample in samples(written, part) for scan in scans_shown(written, sample, scan_of_pixels)}
        for part in ("train", "held_out")
    )
    assert len(train) > 300 and len(held_out) > 80
    assert not train & held_out


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_every_answer_is_right(part: str, written: Path, scan_of_pixels: dict[bytes, int]) -> None:
    labels, answers = load_digits().target, Counter()
    for sample in samples(written, part):
        shown = scans_shown(written, sample, scan_of_pixels)
        assert len(shown) == len(set(shown)) == {"which": 1, "parity": 1, "text": 0}.get(sample["kind"], 2)
        turns = sample["conversations"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert (question["from"], answer["from"]) == ("human", "gpt")
            text = question["value"].removeprefix("<image>\n")
            assert answer["value"] == expected_answer(text, labels[shown].tolist()), (sample, labels[shown])
            answers[answer["value"]] += 1
    assert answers.keys() > {"even", "odd", "equal", *WORDS[:13]}


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_sample_asks_for_its_kind_first(part: str, written: Path) -> None:
    first_words = {
        "which": r"digit (is|do)|Name the digit",
        "parity": "even|Even",
        "larger": "larger",
        "sum": "[Aa]dd|sum|plus",
    }
    asked: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for sample in samples(written, part):
        question = sample["conversations"][0]["value"]
        assert question.startswith("<image>\n") == (sample["kind"] != "text")
        assert all("<image>" not in turn["value"] for turn in sample["conversations"][1:])
        assert re.search(first_words.get(sample["kind"], "|".join(first_words.values())), question)
        asked[sample["kind"]].add(question)
    assert {kind: len(found) for kind, found in asked.items() if kind != "text"} == dict.fromkeys(first_words, 3)
    assert len(asked["text"]) > 10


def test_how_many_there_are_of_each_kind(written: Path) -> None:
    train, held_out = samples(written, "train"), samples(written, "held_out")
    assert Counter(sample["kind"] for sample in held_out) == dict.fromkeys(KINDS, NUM_HELD_OUT // 5)
    assert {len(sample["conversations"]) for sample in held_out} == {2}
    num_text = NUM_TRAIN // 10
    of_each = (NUM_TRAIN - num_text) // 4
    assert Counter(sample["kind"] for sample in train) == {**dict.fromkeys(KINDS, of_each), "text": num_text}
    two_questions = Counter(sample["kind"] for sample in train if len(sample["conversations"]) == 4)
    assert two_questions == dict.fromkeys(("which", "parity", "larger", "sum"), NUM_TRAIN // 5 // 4)
    ids = [sample["id"] for sample in train + held_out]
    assert len(set(ids)) == NUM_TRAIN + NUM_HELD_OUT and ids[3] == "sum-000003"
    pictures = [sample["image"] for sample in train + held_out if "image" in sample]
    assert sorted(pictures) == sorted(path.name for path in (written / "images").iterdir())


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_the_conversations_can_be_read(part: str, written: Path) -> None:
    kept, broken = read_conversations(written / f"{part}.json", written / "images")
    given = samples(written, part)
    assert len(broken) == 0 and [one.kind for one in kept] == [sample["kind"] for sample in given]
    assert [one.turns[0].text for one in kept] == [sample["conversations"][0]["value"] for sample in given]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_a_function_of_the_arguments(tmp_path: Path) -> None:
    def write(name: str, num_train: int, seed: int) -> dict[str, bytes]:
        write_digit_questions(tmp_path / name, num_train=num_train, num_held_out=25, seed=seed)
        return content(tmp_path / name)

    one, same, other, longer = write("one", 40, 3), write("same", 40, 3), write("other", 40, 4), write("longer", 50, 3)
    assert one == same
    assert {name for name in one if one[name] == other.get(name)} == {name for name in one if "tokenizer/" in name}
    conversations, of_longer = (
        [sample["conversations"] for sample in json.loads(files["held_out.json"])] for files in (one, longer)
    )
    assert conversations == of_longer  # the held-out questions stay when there is more to train on
    assert sorted(path.name for path in tmp_path.iterdir()) == ["longer", "one", "other", "same"]


def test_the_tokenizer_knows_every_word(written: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = {
        turn["value"].removeprefix("<image>\n")
        for part in ("train", "held_out")
        for sample in samples(written, part)
        for turn in sample["conversations"]
    } | set(WORDS)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
        assert len(ids) == len(re.findall(r"\w+|[?.,]", text))
    assert tokenizer("heptagon")["input_ids"] == [tokenizer.unk_token_id]
    special = ["<pad>", "<unk>", "</s>", "<image>"]
    assert [tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token] == special[:3]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3]
    assert tokenizer.decode(tokenizer("nine</s>")["input_ids"], skip_special_tokens=True) == "nine"
    assert len(tokenizer) < 80


def tokens(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    found = encode(conversation, tokenizer, "own", image_token_id=IMAGE_ID, tokens_per_image=PER_IMAGE)
    return found.input_ids, found.labels


def test_the_template_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ("<image>\nEven or odd?", "odd", "Name the digit.", "seven")
    turns = tuple(Turn(text=text, is_learned=i % 2 == 1) for i, text in enumerate(texts))
    ids, labels = tokens(Conversation(name="a", images=(Path("a.png"),), turns=turns), tokenizer)
    text = "Q: I I I Even or odd ? A: odd </s> Q: Name the digit . A: seven </s>"
    words = text.split()
    expected = [IMAGE_ID if word == "I" else tokenizer.get_vocab()[word] for word in words]
    assert ids == expected
    assert [i for i, label in enumerate(labels) if label != IGNORED] == [9, 10, 17, 18]
    messages = [{"role": "assistant" if turn.is_learned else "user", "content": turn.text} for turn in turns]
    first = "Q: <image>\nEven or odd?\nA: odd</s>Q: Name the digit."
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{first}\nA: seven</s>"
    assert tokenizer.apply_chat_template(messages[:3], tokenize=False) == f"{first}\n"


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_answers_and_their_ends_are_learned(part: str, written: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for conversation in read_conversations(written / f"{part}.json", written / "images")[0]:
        ids, labels = tokens(conversation, tokenizer)
        learned = [label for label in labels if label != IGNORED]
        assert [tokenizer.decode(learned[i : i + 2]) for i in range(0, len(learned), 2)] == [
            f"{turn.text}</s>" for turn in conversation.turns if turn.is_learned
        ]
        assert tokenizer.unk_token_id not in ids and ids.count(IMAGE_ID) == PER_IMAGE * len(conversation.images)


NUMBERS = {"num_train": 10, "num_held_out": 5, "seed": 0}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_train": 0}, "The number of training samples is 0 but must be at least 1."),
        ({"num_held_out": -2}, "The number of held-out samples is -2 but must be at least 1."),
        ({"seed": -1}, "The seed is -1 but must be at least 0."),
    ],
)
def test_numbers_that_cannot_be(wrong: dict[str, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        write_digit_questions(tmp_path / "new", **NUMBERS | wrong)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DataError, match=re.escape(f"{folder} exists and is not an empty folder. Choose another")):
            write_digit_questions(folder, **NUMBERS)
    with pytest.raises(DataError, match=r"new cannot be written: Not a directory\. Choose another folder"):
        write_digit_questions(tmp_path / "notes.txt" / "new", **NUMBERS)
    assert content(tmp_path) == {"notes.txt": b"mine"}


def test_nothing_is_left_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match="new cannot be written: No space left on device"):
        write_digit_questions(tmp_path / "new", **NUMBERS)
    assert not list(tmp_path.iterdir())


def test_scikit_learn_is_asked_for_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn, which is not installed\. Use `pip install scikit-learn`"):
        write_digit_questions(tmp_path / "new", **NUMBERS)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_the_function_does_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "command").mkdir()  # an empty folder may be there
    given = ["--train", "20", "--held-out", "5", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["digit_questions", str(tmp_path / "command"), *given])
    monkeypatch.delitem(sys.modules, "dynmoe_ds.data.digit_questions")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("dynmoe_ds.data.digit_questions", run_name="__main__")
    assert caught.value.code == 0
    assert caplog.messages == [f"{tmp_path / 'command'}: 20 training samples, 5 held out, pictures and a tokenizer"]
    write_digit_questions(tmp_path / "function", num_train=20, num_held_out=5, seed=1)
    assert content(tmp_path / "command") == content(tmp_path / "function")


def test_the_command_without_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "dynmoe_ds.data.digit_questions.write_digit_questions", lambda folder, **found: given.update(found)
    )
    assert main([str(tmp_path)]) == 0
    assert given == {"num_train": 6000, "num_held_out": 800, "seed": 0}


def test_the_command_tells_a_users_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(tmp_path / "new"), "--train", "0"]) == 2
    assert caplog.messages == ["dynmoe: The number of training samples is 0 but must be at least 1."]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "Write questions about handwritten digits in LLaVA's JSON"),
        ([], 2, "the following arguments are required: FOLDER"),
        (["new", "--train", "many"], 2, "argument --train: invalid int value: 'many'"),
    ],
)
def test_the_commands_usage(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == code and words in out + err and "--held-out N" in out + err
