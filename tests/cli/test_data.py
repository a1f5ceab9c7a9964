"""`dynmoe data index` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.megatron import needs_megatron, word_tokenizer

from dynmoe_ds.cli.main import main
from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import MegatronIndexedConfig
from dynmoe_ds.data import load_megatron_indexed


@needs_megatron
def test_the_printed_command_trains_on_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, out = word_tokenizer(tmp_path / "tokenizer"), str(tmp_path / "corpus")
    (tmp_path / "a.jsonl").write_text('{"content": "1 2 3 4"}\n' * 20)
    options = ["--json-key", "content", "--tokenizer", tokenizer, "--out", out]
    assert main(["data", "index", str(tmp_path / "a.jsonl"), *options]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{out}: 20 documents, 100 tokens of a vocabulary of 201"
    start = "train on it with: dynmoe train "
    assert second.startswith(start)
    monkeypatch.delenv("DYNMOE_RUN_DIR", raising=False)
    overrides = [word.strip("'") for word in second.removeprefix(start).split()]
    small = ["data.sequence_length=5", "data.held_out_fraction=0.1", "run_dir=runs/never-made-by-a-test"]
    config = load_config([*overrides, *small])
    assert isinstance(config.data, MegatronIndexedConfig)
    data = load_megatron_indexed(config.data)
    assert (len(data.train), len(data.held_out)) == (18, 2)
    assert data.train.batch([0])["input_ids"].tolist() == [[1, 2, 3, 4, 200]]


def test_faults_end_with_2_and_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", "a.txt", "--tokenizer", "nowhere", "--out", str(tmp_path / "corpus")]) == 2
    assert "dynmoe: --tokenizer is 'nowhere' but there is no such file or folder" in capsys.readouterr().err
