from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.megatron import NUM_WORDS, needs_megatron, word_tokenizer

from dynmoe_ds.data.megatron_indexed import read_vocabulary
from dynmoe_ds.data.megatron_writer import read_documents, write_indexed_dataset
from dynmoe_ds.errors import DataError


def test_documents_of_text_and_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    # A line separator of Unicode inside a text does not end the line.
    lines = [json.dumps({"text": "x\u2028y", "n": 1}, ensure_ascii=False), "", json.dumps({"text": "z\nz"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert list(read_documents(files, "text")) == ["one\ntwo\n", "x\u2028y", "z\nz"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"content": "x"}', '{"text": 3}'])
def test_a_line_without_text_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        list(read_documents([path], "text"))
    assert str(caught.value).startswith(f"{path} has no text under 'text' in line 2: {line!r}. Every line must be")


@needs_megatron
def test_what_is_written_is_what_megatron_core_reads(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    vocabulary = read_vocabulary(word_tokenizer(tmp_path / "tokenizer"))
    counts = write_indexed_dataset(["1 2 3", "", "  ", "4", "5 6"], tmp_path / "new" / "corpus", vocabulary)
    expected = [[1, 2, 3, NUM_WORDS], [4, NUM_WORDS], [5, 6, NUM_WORDS]]
    found = IndexedDataset(str(tmp_path / "new" / "corpus"))
    assert [found[i].tolist() for i in range(len(found))] == expected
    assert found.document_indices.tolist() == [0, 1, 2, 3]
    assert np.fromfile(tmp_path / "new" / "corpus.bin", dtype=np.uint16).tolist() == [1, 2, 3, 200, 4, 200, 5, 6, 200]
    assert (counts.num_documents, counts.num_tokens) == (3, 9)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["corpus.bin", "corpus.idx"]


@needs_megatron
def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def documents() -> Iterator[str]:
        for _ in range(1000):
            yield "1 2 3"
        raise KeyboardInterrupt

    vocabulary = read_vocabulary(word_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(KeyboardInterrupt):
        write_indexed_dataset(documents(), tmp_path / "corpus", vocabulary)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@needs_megatron
def test_what_is_there_stays_and_nothing_is_written_of_no_text(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(word_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(DataError, match=r"^There is no text to write to .*corpus: all files are empty"):
        write_indexed_dataset(["", " "], tmp_path / "corpus", vocabulary)
    (tmp_path / "corpus.bin").write_text("of an interrupted run")
    with pytest.raises(DataError, match=r"corpus\.bin exists already\. Choose another --out, or move it away"):
        write_indexed_dataset(["1"], tmp_path / "corpus", vocabulary)
    assert (tmp_path / "corpus.bin").read_text() == "of an interrupted run"
