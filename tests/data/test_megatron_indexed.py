from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.megatron import NUM_WORDS, needs_megatron, word_tokenizer, write_documents
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import MegatronIndexedConfig
from dynmoe_ds.data import BlendedWindows, TrainingOrder, load_megatron_indexed, train_tokenizer
from dynmoe_ds.data.megatron_indexed import read_vocabulary
from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.integrations import megatron

BOOKS = [range(start, start + 9) for start in range(0, 100, 10)]  # ten documents of nine ids and an end
WEB = [range(100, 139), range(140, 159), range(160, 199)]  # of 40, 20 and 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`books`, `web` and their `tokenizer`."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = word_tokenizer(folder / "tokenizer")
    write_documents(folder / "books", BOOKS, tokenizer)
    write_documents(folder / "web", WEB, tokenizer)
    return folder


def _config(folder: Path, *names: str, **changes: Any) -> MegatronIndexedConfig:
    values: dict[str, Any] = {
        "paths": tuple(str(folder / name) for name in names),
        "tokenizer": str(folder / "tokenizer"),
        "sequence_length": 10,
        "held_out_fraction": 0.3,
    }
    return MegatronIndexedConfig(**values | changes)


def _rows(windows: BlendedWindows, epoch: int = 0) -> list[list[int]]:
    return windows.batch(range(len(windows)), epochs=[epoch] * len(windows))["input_ids"].tolist()


@needs_megatron
def test_windows_of_one_data_set_are_its_documents(corpus: Path) -> None:
    """Documents as long as a window: each window is a whole one, the last three are held out."""
    data = load_megatron_indexed(_config(corpus, "books"))
    whole = [[*document, NUM_WORDS] for document in BOOKS]
    assert sorted(_rows(data.train)) == whole[:7]
    assert sorted(_rows(data.held_out)) == whole[7:]
    assert _rows(data.train) != sorted(_rows(data.train)), "Megatron shuffles"
    assert (data.vocab_size, data.end_of_text, data.train.length) == (NUM_WORDS + 1, NUM_WORDS, 10)
    assert data.tokenizer().encode("5 7").ids == [5, 7]
    batch = data.train.batch([1, 0])
    assert batch["input_ids"].dtype == torch.int64 and torch.equal(batch["labels"], batch["input_ids"])


@needs_megatron
def test_a_blend_is_what_megatron_core_blends(corpus: Path) -> None:
    """Without weights, all windows are those of its own BlendedDataset; with weights, as many of each data set."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    def theirs(weights: list[float] | None, size: int | None) -> list[list[int]]:
        config = GPTDatasetConfig(
            random_seed=0, sequence_length=10, blend=([str(corpus / "books"), str(corpus / "web")], weights),
            split="70,30,0", path_to_cache="", reset_position_ids=False, reset_attention_mask=False,
            eod_mask_loss=False, add_extra_token_to_sequence=False, create_attention_mask=False,
            tokenizer=SimpleNamespace(vocab_size=201, eod=200, unique_identifiers={}),
        )  # fmt: skip
        built = BlendedMegatronDatasetBuilder(GPTDataset, [size, size, size], lambda: True, config).build()[0]
        return [built[i]["tokens"].tolist() for i in range(len(built))]

    def of_books(rows: list[list[int]]) -> int:
        return sum(row[0] < 100 for row in rows)

    ours = _rows(load_megatron_indexed(_config(corpus, "books", "web")).train)
    assert sorted(ours) == sorted(theirs(None, None))
    assert (len(ours), of_books(ours)) == (13, 7)
    weighted = _rows(load_megatron_indexed(_config(corpus, "books", "web", weights=(3, 1))).train)
    assert len(weighted) == 13 and of_books(weighted) == of_books(theirs([3.0, 1.0], 13)[:13]) == 10


class _Counted:
    """A data set whose windows are their numbers, after `first`."""

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < self.size
        return {"tokens": torch.tensor([self.first + index])}


@needs_megatron
def test_a_data_set_goes_on_in_the_next_epoch_where_it_stopped() -> None:
    """Six windows and two, half and half: four of each per epoch, so all six are read once in an epoch and a half."""
    windows = BlendedWindows([_Counted(0, 6), _Counted(10, 2)], 1, [1, 1])
    assert len(windows) == 8
    epochs = [sorted(row[0] for row in _rows(windows, epoch)) for epoch in range(3)]
    assert epochs == [
        [0, 1, 2, 3, 10, 10, 11, 11],
        [0, 1, 4, 5, 10, 10, 11, 11],
        [2, 3, 4, 5, 10, 10, 11, 11],
    ]
    assert _rows(BlendedWindows([_Counted(0, 6), _Counted(10, 2)], 1), 5) == _rows(
        BlendedWindows([_Counted(0, 6), _Counted(10, 2)], 1), 0
    ), "without shares every epoch is one pass"


@needs_megatron
def test_any_step_can_be_read_alone(corpus: Path) -> None:
    """What a run that is resumed in its second epoch reads is what the first one read."""
    config = _config(corpus, "books", "web", weights=(1.0, 1.0))

    def read(first: int, last: int) -> list[Any]:
        train = load_megatron_indexed(config).train
        order = TrainingOrder(
            seed=3, num_sequences=len(train), micro_batch_size=4, gradient_accumulation_steps=1, rank=0, world_size=1
        )
        return [
            train.batch(order.indices(step, 0), epochs=order.epochs(step, 0))["input_ids"].tolist()
            for step in range(first, last)
        ]

    assert read(0, 8)[5:] == read(5, 8)


def _missing(folder: Path) -> None:
    (folder / "web.bin").unlink()


def _cut_short(folder: Path) -> None:
    os.truncate(folder / "web.bin", 100)


def _no_index(folder: Path) -> None:
    (folder / "web.idx").write_bytes(b"something else, but long enough to have a header of its own")


def _outside(folder: Path) -> None:
    """In the last token, which the last rank reads."""
    ids = np.fromfile(folder / "web.bin", dtype=np.uint16)
    ids[-1] = 201
    ids.tofile(folder / "web.bin")


def _other_tokenizer(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.unlink()


FAULTS = {
    _missing: "{0}/web.bin is missing (seen from {1}), so {0}/web cannot be read. Copy both files, or write them again",
    _cut_short: "{0}/web.bin has 100 bytes but {0}/web.idx says 200. Copy both files",
    _no_index: "{0}/web.idx is no index of Megatron's: bad header, cannot read: {0}/web.idx. Copy both",
    _outside: "{0}/web.bin holds the id 201 at token 99, but data.tokenizer has 201 ids. Name the tokenizer that made",
    _other_tokenizer: "data.tokenizer is '{0}/tokenizer' but holds no tokenizer that can be read: ",
}


def _load_all(rank: int, world_size: int, folders: list[Path]) -> dict[str, Any]:
    messages = []
    for folder in folders:
        with pytest.raises(DataError) as caught:
            load_megatron_indexed(_config(folder, "books", "web"))
        messages.append(str(caught.value))
    return {"messages": messages, "rows": _rows(load_megatron_indexed(_config(folders[0].parent, "books")).train)}


@needs_megatron
def test_every_rank_says_what_is_wrong_and_reads_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / spoil.__name__ for spoil in FAULTS]
    for folder in (tmp_path, *folders):
        tokenizer = word_tokenizer(folder / "tokenizer")
        write_documents(folder / "books", BOOKS, tokenizer)
        write_documents(folder / "web", WEB, tokenizer)
    for spoil, folder in zip(FAULTS, folders, strict=True):
        spoil(folder)
    first, second = run_ranks(_load_all, 2, folders, timeout_s=120)
    assert first == second
    for message, folder, expected in zip(first["messages"], folders, FAULTS.values(), strict=True):
        assert message.startswith(expected.format(folder, Path.cwd())), message
    assert first["rows"] == _rows(load_megatron_indexed(_config(tmp_path, "books")).train)


@needs_megatron
def test_parts_that_are_too_short_are_named(corpus: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_megatron_indexed(_config(corpus, "books", "web", sequence_length=41))
    books, web = str(caught.value).splitlines()
    assert books == (
        f"{corpus}/books has 10 documents, of which 3 with 30 tokens are its held-out part, too few for a window of "
        "data.sequence_length=41. Use a shorter data.sequence_length or another data.held_out_fraction, or leave the "
        "data set out."
    )
    assert web.startswith(f"{corpus}/web has 3 documents, of which 1 with 40 tokens are its held-out part")


def test_without_megatron_core_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "find_megatron", lambda: None)
    with pytest.raises(ConfigError, match=r"needs megatron-core, .*pip install 'dynmoe-ds\[megatron\]"):
        load_megatron_indexed(_config(tmp_path, "books"))


def test_the_token_that_ends_a_text_must_be_known(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["abc"], 257)
    tokenizer.save(str(tmp_path / "ours.json"))
    assert read_vocabulary(str(tmp_path / "ours.json")).end_of_text == tokenizer.token_to_id("<|endoftext|>")
    (tmp_path / "other.json").write_text((tmp_path / "ours.json").read_text().replace("endoftext", "fin"))
    with pytest.raises(DataError, match=r"^--tokenizer is '.*other\.json', which names no token that ends a text"):
        read_vocabulary(str(tmp_path / "other.json"), key="--tokenizer")
