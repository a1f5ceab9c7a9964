"""`dynmoe tokenize` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dynmoe_ds.cli.main import main
from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import TokenShardsConfig
from dynmoe_ds.data import load_token_shards
from dynmoe_ds.data.shard_index import read_index


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "book.txt").write_text("a sentence that is trained on, again and again\n" * 40)
    (tmp_path / "held.txt").write_text("zyxwv zyxwv zyxwv zyxwv\n" * 40)
    return str(tmp_path / "book.txt"), str(tmp_path / "held.txt")


def test_the_printed_command_trains_on_what_was_written(
    texts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    book, held = texts
    out = str(tmp_path / "shards")
    assert (
        main(["tokenize", book, "--held-out", held, "--vocab-size", "280", "--out", out, "--shard-tokens", "50"]) == 0
    )
    first, second = capsys.readouterr().out.splitlines()
    index = read_index(tmp_path / "shards")
    num_tokens = sum(shard.num_tokens for shard in index.shards)
    assert first == f"{out}: {len(index.shards)} shards, {num_tokens} tokens of a vocabulary of 280"
    assert {shard.num_tokens for shard in index.shards if shard.file.startswith("train")} >= {50}
    start = "train on it with: dynmoe train "
    assert second.startswith(start)
    monkeypatch.delenv("DYNMOE_RUN_DIR", raising=False)
    overrides = [word.strip("'") for word in second.removeprefix(start).split()]
    config = load_config([*overrides, "data.sequence_length=20", "run_dir=runs/never-made-by-a-test"])
    assert isinstance(config.data, TokenShardsConfig)
    data = load_token_shards(config.data)
    tokenizer = data.tokenizer()
    assert tokenizer is not None
    assert "zyxwv" in tokenizer.decode(data.held_out.batch([0])["input_ids"][0].tolist())
    assert not any("zy" in token for token in tokenizer.get_vocab()), "held-out text shaped the tokenizer"


def test_without_held_out_files_the_last_windows_are_held_out(
    texts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenize", texts[0], "--vocab-size", "280", "--out", str(tmp_path / "shards")]) == 0
    command = capsys.readouterr().out.splitlines()[1]
    assert command == f"train on it with: dynmoe train data=token_shards data.path={tmp_path / 'shards'}"


def test_a_tokenizer_of_ones_own_and_its_end_of_text(texts: tuple[str, str], tmp_path: Path) -> None:
    main(["tokenize", texts[0], "--vocab-size", "280", "--out", str(tmp_path / "first")])
    own = Tokenizer.from_file(str(tmp_path / "first" / "tokenizer.json"))
    own.add_special_tokens(["</s>"])
    own.save(str(tmp_path / "own.json"))
    options = ["--tokenizer", str(tmp_path / "own.json"), "--end-of-text", "</s>", "--out", str(tmp_path / "second")]
    assert main(["tokenize", texts[1], *options]) == 0
    index = read_index(tmp_path / "second")
    assert (index.vocab_size, index.end_of_text) == (281, 280)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tokenizer", "t.json", "--vocab-size", "300"],
            "--vocab-size is for a new tokenizer, but --tokenizer names",
        ),
        (["--end-of-text", "</s>"], "--end-of-text names a token of --tokenizer, which is not given. Leave it out."),
        (["--shard-tokens", "0"], "--shard-tokens is 0 but must be at least 1."),
        (["--tokenizer", "nowhere.json"], "nowhere.json is no tokenizer: "),
        (["--vocab-size", "256"], "--vocab-size is 256 but must be at least 257: 256 bytes and the end of text."),
        (["--held-out", "nowhere.txt"], "nowhere.txt cannot be read: No such file or directory."),
    ],
)
def test_faults_end_with_2_and_a_message(
    texts: tuple[str, str], options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenize", texts[0], "--out", str(tmp_path / "shards"), *options]) == 2
    assert f"dynmoe: {message}" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_a_file_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "nowhere.txt", "--out", str(tmp_path / "shards")]) == 2
    assert "dynmoe: nowhere.txt cannot be read: No such file or directory." in capsys.readouterr().err
