from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.shards import write_shards
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import TokenShardsConfig
from dynmoe_ds.data import HeldOutOrder, TokenWindows, TrainingOrder, load_token_shards, train_tokenizer
from dynmoe_ds.data.shard_index import read_index
from dynmoe_ds.errors import DataError


def _config(folder: Path, **changes: Any) -> TokenShardsConfig:
    return TokenShardsConfig(**{"path": str(folder), "sequence_length": 4, "held_out_windows": 2, **changes})


def _rows(windows: TokenWindows) -> list[list[int]]:
    return windows.batch(range(len(windows)))["input_ids"].tolist()


def test_windows_by_hand():
    """Shards of 9, 3 and 8 tokens in windows of 4: two, none and two; one token and three are left out."""
    shards = [np.arange(9), np.arange(20, 23), np.arange(30, 38)]
    windows = TokenWindows(shards, 4)
    assert _rows(windows) == [[0, 1, 2, 3], [4, 5, 6, 7], [30, 31, 32, 33], [34, 35, 36, 37]]
    first, last = windows.without_last(1)
    assert (_rows(first), _rows(last)) == (_rows(windows)[:3], _rows(windows)[3:])
    assert (windows.length, len(first), len(last)) == (4, 3, 1)


def test_a_batch_is_int64_and_labels_are_the_ids():
    batch = TokenWindows([np.arange(65_530, 65_536, dtype="<u2")], 3).batch([1, 0])
    assert batch["input_ids"].tolist() == [[65_533, 65_534, 65_535], [65_530, 65_531, 65_532]]
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_folder_is_read_as_it_was_written(tmp_path, dtype):
    write_shards(tmp_path, {"a.bin": range(10), "b.bin": range(50, 62)}, dtype=dtype)
    data = load_token_shards(_config(tmp_path))
    assert _rows(data.train) == [[0, 1, 2, 3], [4, 5, 6, 7], [50, 51, 52, 53]]
    assert _rows(data.held_out) == [[54, 55, 56, 57], [58, 59, 60, 61]]
    assert (data.vocab_size, data.end_of_text, data.tokenizer()) == (100, 0, None)


def test_shards_are_mapped_not_loaded(tmp_path):
    """The file is changed after it was opened: a copy in memory would not see it."""
    write_shards(tmp_path, {"a.bin": range(16)})
    data = load_token_shards(_config(tmp_path))
    with open(tmp_path / "a.bin", "r+b") as file:
        file.write(np.array([77], dtype="<u2").tobytes())
    assert _rows(data.train)[0] == [77, 1, 2, 3]


def test_named_shards_are_held_out(tmp_path):
    write_shards(tmp_path, {"a.bin": range(8), "b.bin": range(50, 58), "c.bin": range(60, 68)})
    data = load_token_shards(_config(tmp_path, held_out_windows=None, held_out_shards=("b.bin",)))
    assert _rows(data.train) == [[0, 1, 2, 3], [4, 5, 6, 7], [60, 61, 62, 63], [64, 65, 66, 67]]
    assert _rows(data.held_out) == [[50, 51, 52, 53], [54, 55, 56, 57]]


def test_an_epoch_reads_every_training_window_once_and_no_held_out_one(tmp_path):
    write_shards(tmp_path, {"a.bin": range(40), "b.bin": range(40, 80)})
    data = load_token_shards(_config(tmp_path))
    order = TrainingOrder(
        seed=5, num_sequences=len(data.train), micro_batch_size=3, gradient_accumulation_steps=2, rank=0, world_size=1
    )
    read = [
        row[0]
        for step in range(3)
        for half in range(2)
        for row in data.train.batch(order.indices(step, half))["input_ids"].tolist()
    ]
    assert sorted(read) == list(range(0, 72, 4))
    assert read != sorted(read)
    held_out = HeldOutOrder(num_sequences=len(data.held_out), micro_batch_size=2, rank=0, world_size=1)
    assert [data.held_out.batch(indices)["input_ids"][:, 0].tolist() for indices, _ in held_out] == [[72, 76]]


def test_the_tokenizer_beside_the_shards_comes_along(tmp_path):
    write_shards(tmp_path, {"a.bin": range(16)}, vocab_size=300)
    tokenizer = train_tokenizer(["abc"], 257)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = load_token_shards(_config(tmp_path)).tokenizer()
    assert found is not None and found.encode("cab").ids == tokenizer.encode("cab").ids


def _missing(folder: Path) -> None:
    (folder / "b.bin").unlink()


def _cut_short(folder: Path) -> None:
    os.truncate(folder / "b.bin", 10)


def _changed(folder: Path) -> None:
    np.arange(8, dtype="<u2")[::-1].tofile(folder / "b.bin")


def _outside_the_vocabulary(folder: Path) -> None:
    write_shards(folder, {"a.bin": range(16), "b.bin": [*range(6), 100, 7]})


def _without_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def _index_is_no_json(folder: Path) -> None:
    (folder / "index.json").write_text("{")


def _strange_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def _large_tokenizer(folder: Path) -> None:
    train_tokenizer(["abc"], 257).save(str(folder / "tokenizer.json"))


FAULTS = {
    _missing: "b.bin is listed in index.json but cannot be read: No such file or directory. Copy it here.",
    _cut_short: "b.bin has 10 bytes but index.json says 16 (8 tokens of uint16). Copy or write it again.",
    _changed: "b.bin is not the file whose sha256 is in index.json. Copy or write it again.",
    _outside_the_vocabulary: "b.bin holds the id 100 at token 6, but the vocabulary of index.json has 100. Write the",
    _without_index: "index.json is missing, so ",
    _index_is_no_json: "index.json cannot be read: Expecting property name",
    _strange_tokenizer: "tokenizer.json is no tokenizer: ",
    _large_tokenizer: "tokenizer.json has 257 tokens and for id 0 '<|endoftext|>', which does not fit index.json "
    "(vocab_size 100, end_of_text 0). Write the folder again with `dynmoe tokenize`.",
}


def _faulty_folders(parent: Path) -> list[Path]:
    """A folder per fault, each of shards of 16 and 8 tokens."""
    folders = []
    for spoil in FAULTS:
        folder = parent / spoil.__name__
        write_shards(folder, {"a.bin": range(16), "b.bin": range(8)})
        spoil(folder)
        folders.append(folder)
    return folders


def _load_all(rank: int, world_size: int, folders: list[Path]) -> dict[str, Any]:
    messages = []
    for folder in folders:
        try:
            load_token_shards(_config(folder))
        except DataError as error:
            messages.append(str(error))
    write_shards(folders[0].parent / "sound", {"a.bin": range(16), "b.bin": range(8)}) if rank == 0 else None
    torch.distributed.barrier()
    return {"messages": messages, "rows": _rows(load_token_shards(_config(folders[0].parent / "sound")).train)}


def test_every_rank_names_the_file_that_is_wrong(tmp_path):
    """Of the content each rank checks a share: only rank 1 reads b.bin, and only rank 0 the index and the tokenizer."""
    folders = _faulty_folders(tmp_path)
    first, second = run_ranks(_load_all, 2, folders)
    assert first == second
    for message, folder, expected in zip(first["messages"], folders, FAULTS.values(), strict=True):
        assert message.startswith(f"{folder}/{expected}"), message
    assert first["rows"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_alone_the_faults_are_the_same(tmp_path):
    for folder, expected in zip(_faulty_folders(tmp_path), FAULTS.values(), strict=True):
        with pytest.raises(DataError) as caught:
            load_token_shards(_config(folder))
        assert str(caught.value).startswith(f"{folder}/{expected}")


def test_all_missing_shards_are_named_up_to_ten(tmp_path):
    write_shards(tmp_path, {f"{number}.bin": range(8) for number in range(13)})
    for number in range(12):
        (tmp_path / f"{number}.bin").unlink()
    with pytest.raises(DataError) as caught:
        load_token_shards(_config(tmp_path))
    lines = str(caught.value).splitlines()
    assert [line.partition(" is listed")[0] for line in lines[:10]] == [f"{tmp_path}/{n}.bin" for n in range(10)]
    assert lines[10:] == ["And 2 more."]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"held_out_windows": 6},
            r"has no training window of .*=4 tokens \(0 for training, 6 held out\)\. Use a shorter",
        ),
        ({"held_out_windows": 9}, r"\(0 for training, 6 held out\)"),
        (
            {"sequence_length": 17},
            r"has no training window of data\.sequence_length=17 tokens \(0 for .*, 0 held out\)",
        ),
        (
            {"sequence_length": 16, "held_out_windows": None, "held_out_shards": ("b.bin",)},
            r"has no held-out window of data\.sequence_length=16 tokens \(1 for training, 0 held out\)",
        ),
        (
            {"held_out_windows": None, "held_out_shards": ("b.bin", "c.bin", "d.bin")},
            r"data\.held_out_shards names c\.bin, d\.bin, but .*index\.json lists a\.bin, b\.bin\.",
        ),
    ],
)
def test_parts_that_cannot_be_made_are_refused(tmp_path, changes, message):
    write_shards(tmp_path, {"a.bin": range(16), "b.bin": range(8)})
    with pytest.raises(DataError, match=message):
        load_token_shards(_config(tmp_path, **changes))


SHARD = {"file": "a.bin", "num_tokens": 4, "sha256": "0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": 3}, "must be an object with the keys dtype, vocab_size, end_of_text and shards"),
        ({"dtype": "int64"}, "has the dtype 'int64', but ids are uint16 or uint32"),
        ({"end_of_text": 10}, "has end_of_text 10 and vocab_size 10, but must have 0 <= end_of_text < vocab_size"),
        ({"vocab_size": "10"}, "has end_of_text 0 and vocab_size '10', but must have"),
        ({"shards": []}, "lists no shards"),
        ({"shards": [{"file": "a.bin"}]}, "has the shard {'file': 'a.bin'}, but a shard is an object with the keys"),
        ({"shards": [{**SHARD, "file": "../a.bin"}]}, "but file must be a name without folders and sha256 text"),
        ({"shards": [{**SHARD, "num_tokens": 0}]}, "says that a.bin has 0 tokens, but a shard has at least 1"),
    ],
)
def test_a_wrong_index_is_refused_with_what_is_wrong(tmp_path, changes, message):
    index = {"dtype": "uint16", "vocab_size": 10, "end_of_text": 0, "shards": [SHARD], **changes}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError) as caught:
        read_index(tmp_path)
    assert f"{tmp_path}/index.json " in str(caught.value) and message in str(caught.value)
    assert str(caught.value).endswith("Write the folder again with `dynmoe tokenize`.")
