from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from dynmoe_ds.config.schema import TokenShardsConfig
from dynmoe_ds.data import END_OF_TEXT, load_token_shards, shard_writer, train_tokenizer, write_token_shards
from dynmoe_ds.data.shard_index import DTYPES, read_index
from dynmoe_ds.data.shard_writer import text_pieces
from dynmoe_ds.errors import DataError

TEXTS = {"one": "Grüße,\r\n  if x:\n\treturn 漢字\n" * 40, "two": "no line end", "held": "kept apart\n" * 30}


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    return {name: tmp_path / f"{name}.txt" for name in TEXTS}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS.values(), 300)


def _ids(folder: Path, prefix: str) -> list[int]:
    index = read_index(folder)
    shards = [shard.file for shard in index.shards if shard.file.startswith(prefix)]
    return [int(id_) for file in shards for id_ in np.fromfile(folder / file, dtype=DTYPES[index.dtype])]


@pytest.mark.parametrize("tokens_per_shard", [7, 64, 2**27])
def test_shards_hold_the_texts_each_closed_by_its_end(tmp_path, files, tokenizer, tokens_per_shard, monkeypatch):
    monkeypatch.setattr(shard_writer, "CHARACTERS_PER_PIECE", 50)  # so that a text is read in many pieces
    folder = tmp_path / "deep" / "shards"
    index = write_token_shards(
        [files["one"], files["two"]], folder, tokenizer=tokenizer, held_out_files=[files["held"]],
        tokens_per_shard=tokens_per_shard,
    )  # fmt: skip
    assert index == read_index(folder)
    end = tokenizer.token_to_id(END_OF_TEXT)
    trained, held_out = _ids(folder, "train"), _ids(folder, "held_out")
    assert tokenizer.decode(trained, skip_special_tokens=False) == (
        TEXTS["one"] + END_OF_TEXT + TEXTS["two"] + END_OF_TEXT
    )
    assert tokenizer.decode(held_out, skip_special_tokens=False) == TEXTS["held"] + END_OF_TEXT
    assert (index.end_of_text, trained.count(end), held_out.count(end)) == (end, 2, 1)
    sizes = [shard.num_tokens for shard in index.shards if shard.file.startswith("train")]
    assert set(sizes[:-1]) <= {tokens_per_shard} and 0 < sizes[-1] <= tokens_per_shard
    for shard in index.shards:
        assert hashlib.sha256((folder / shard.file).read_bytes()).hexdigest() == shard.sha256


def test_what_is_written_is_what_training_reads(tmp_path, files, tokenizer):
    folder = tmp_path / "shards"
    write_token_shards([files["one"]], folder, tokenizer=tokenizer, held_out_files=[files["held"]])
    config = TokenShardsConfig(
        path=str(folder), sequence_length=10, held_out_windows=None, held_out_shards=("held_out_00000.bin",)
    )
    data = load_token_shards(config)
    found = data.tokenizer()
    assert found is not None
    first = data.train.batch([0])["input_ids"][0].tolist()
    assert len(first) == 10 and TEXTS["one"].startswith(found.decode(first))
    assert data.vocab_size == tokenizer.get_vocab_size()
    assert TEXTS["held"].startswith(found.decode(data.held_out.batch([0])["input_ids"][0].tolist()))


def test_a_large_vocabulary_takes_four_bytes_per_id(tmp_path, files, tokenizer):
    large = type(tokenizer).from_str(tokenizer.to_str())
    large.add_tokens([f"<{number}>" for number in range(2**16 + 1 - large.get_vocab_size())])
    for name, used, dtype in (("small", tokenizer, "uint16"), ("large", large, "uint32")):
        index = write_token_shards([files["two"]], tmp_path / name, tokenizer=used)
        assert (index.dtype, index.vocab_size) == (dtype, used.get_vocab_size())
    assert _ids(tmp_path / "small", "train") == _ids(tmp_path / "large", "train")
    assert (tmp_path / "large" / "train_00000.bin").stat().st_size == 4 * read_index(tmp_path / "large").shards[
        0
    ].num_tokens


def test_pieces_are_the_text_and_end_with_lines(files, monkeypatch):
    monkeypatch.setattr(shard_writer, "CHARACTERS_PER_PIECE", 30)
    pieces = list(text_pieces(files["one"]))
    assert "".join(pieces) == TEXTS["one"]
    assert len(pieces) > 10 and all(piece.endswith("\n") for piece in pieces)


def test_a_folder_in_use_is_refused_and_an_empty_one_is_taken(tmp_path, files, tokenizer):
    with pytest.raises(DataError, match=r"exists and is not an empty folder\. Choose another one"):
        write_token_shards([files["one"]], tmp_path, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"one\.txt exists and is not an empty folder"):
        write_token_shards([files["one"]], files["one"], tokenizer=tokenizer)
    (tmp_path / "empty").mkdir()
    write_token_shards([files["one"]], tmp_path / "empty", tokenizer=tokenizer)
    assert read_index(tmp_path / "empty").shards


def test_a_text_in_both_parts_is_refused(tmp_path, files, tokenizer):
    with pytest.raises(DataError, match=r"one\.txt would be trained on and held out\. Take it out of one"):
        write_token_shards([files["one"]], tmp_path / "s", tokenizer=tokenizer, held_out_files=[files["one"]])


def test_a_tokenizer_without_the_end_token_is_refused(tmp_path, files, tokenizer):
    with pytest.raises(DataError, match=r"has no token '</s>'\. Name the token that ends a text"):
        write_token_shards([files["one"]], tmp_path / "s", tokenizer=tokenizer, end_of_text="</s>")


def test_a_failure_leaves_nothing_behind(tmp_path, files, tokenizer):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: invalid start byte\. Convert it"):
        write_token_shards([files["one"], latin], tmp_path / "shards", tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read: No such file or directory\. Give the path"):
        write_token_shards([tmp_path / "nowhere.txt"], tmp_path / "shards", tokenizer=tokenizer)
    assert sorted(os.listdir(tmp_path)) == ["held.txt", "latin.txt", "one.txt", "two.txt"]
