"""GLUE's files: a few invented rows per task, laid out as in the download."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tests.helpers.glue import HELD_OUT_FILES, TRAIN_FILES, write_glue, write_tokenizer
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import GlueDataConfig
from dynmoe_ds.data.glue import load_glue_data, read_rows
from dynmoe_ds.data.glue_tasks import GLUE_TASKS
from dynmoe_ds.errors import DataError


def glue_config(folder: Path, **changes: Any) -> GlueDataConfig:
    values = {
        "task": "rte",
        "path": str(folder / "glue"),
        "tokenizer": str(folder / "tokenizer"),
        "sequence_length": 40,
        "num_train": 4,
    }
    return GlueDataConfig(**{**values, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_glue(tmp_path / "glue")
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


# What the helper's first training row of each task says.
FIRST_ROWS = {
    "cola": (("the cat sat",), 1),
    "sst2": (("a fine film ",), 1),
    "mrpc": (('he said " no "', "he refused"), 1),
    "qqp": (('what is "life" ?', "why live ?"), 0),
    "stsb": (("a dog runs", "a dog is running"), 4.75),
    "mnli": (("it rains .", "it is wet ."), 0),
    "qnli": (("who came ?", "the king came ."), 0),
    "rte": (("it rains .", "it is dry ."), 1),
    "wnli": (("it fell since it was old .", "the cup was old ."), 1),
}


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_every_task_reads_its_own_columns(name, folder):
    task = GLUE_TASKS[name]
    rows = read_rows(folder / "glue" / task.folder / "train.tsv", task)
    assert (rows[0].sentences, rows[0].label) == FIRST_ROWS[name]
    assert len(rows) == 4
    for file in task.held_out.values():
        assert len(read_rows(folder / "glue" / task.folder / file, task)) == 3


def test_the_schema_and_the_table_name_the_same_tasks():
    assert get_args(get_type_hints(GlueDataConfig)["task"]) == tuple(GLUE_TASKS)
    assert set(TRAIN_FILES) == set(HELD_OUT_FILES) == set(GLUE_TASKS)


def test_tasks_are_scored_and_shaped_as_glue_says():
    """The table of gluebenchmark.com/tasks."""
    assert {name: task.metrics for name, task in GLUE_TASKS.items()} == {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
    outputs = {name: task.num_outputs for name, task in GLUE_TASKS.items()}
    assert outputs == dict.fromkeys(GLUE_TASKS, 2) | {"mnli": 3, "stsb": 1}
    assert [name for name, task in GLUE_TASKS.items() if task.is_regression] == ["stsb"]


def test_quotes_separators_and_spaces_are_text(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_bytes('g\t1\t\t"\u0085 \u2028a \rb \r\ng\t0\t*\tc" \n'.encode())
    rows = read_rows(file, GLUE_TASKS["cola"])
    assert [row.sentences for row in rows] == [('"\u0085 \u2028a \rb ',), ('c" ',)]


def test_a_byte_order_mark_is_no_part_of_the_header(folder):
    """MRPC's train.tsv begins with one."""
    assert (folder / "glue/MRPC/train.tsv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_broken_rows_of_qqp_are_skipped_and_counted(folder, caplog):
    file = folder / "glue/QQP/train.tsv"
    with file.open("a") as stream:
        stream.write('9\t1\t2\t"one\n"\ttwo ?\t0\n')  # a row in two lines, as in the download
    with caplog.at_level(logging.WARNING):
        assert len(read_rows(file, GLUE_TASKS["qqp"])) == 4
    assert caplog.messages == [f"{file}: skipped 2 rows that do not have 6 columns."]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("rte", "4\tone sentence\tentailment", r"train.tsv, line 6 has 3 columns instead of 4"),
        ("mrpc", "1\ta\tb\tc\td\te", r"line 6 has 6 columns instead of 5"),
        ("rte", "4\ta\tb\tyes", r"line 6 has the label 'yes' instead of entailment or not_entailment"),
        ("cola", "x\t2\t*\tno", r"line 5 has the label '2' instead of 0 or 1"),
        ("stsb", "\t".join(["0"] * 9 + ["high"]), r"line 6 has the label 'high' instead of a number"),
        ("stsb", "\t".join(["0"] * 9 + ["nan"]), r"line 6 has the label 'nan' instead of a number"),
        ("qqp", "9\t1\t2\ta\tb\t7", r"line 6 has the label '7' instead of 0 or 1"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(name, line, message, folder):
    task = GLUE_TASKS[name]
    file = folder / "glue" / task.folder / "train.tsv"
    with file.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_rows(file, task)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"line 1 has no column sentence1, sentence2, label"),
        (b"index\tsentence1\tlabel\n", r"line 1 has no column sentence2; it has index, sentence1, label"),
        (b"index\tsentence1\tsentence2\tlabel\n", "has no examples"),
        (b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tb\tentailment\n", "is not UTF-8: invalid start byte"),
    ],
)
def test_a_file_that_is_not_glue_s_is_refused(content, message, tmp_path):
    file = tmp_path / "train.tsv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(file, GLUE_TASKS["rte"])


def test_a_folder_in_the_place_of_a_file_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_rows(tmp_path, GLUE_TASKS["rte"])


def test_batches_are_tokenised_padded_and_labelled(folder):
    data = load_glue_data(glue_config(folder))
    ids = {token: data.tokenizer.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]", "[PAD]", "it", "rains")}
    batch = data.train.batch([0, 2])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert all(value.dtype == torch.int64 for value in batch.values())
    short, long = batch["attention_mask"].sum(1).tolist()
    assert batch["input_ids"].shape == (2, max(short, long)) and short < long
    words = batch["input_ids"][0].tolist()
    assert words[:3] == [ids["[CLS]"], ids["it"], ids["rains"]]
    assert words[short - 1] == ids["[SEP]"] and set(words[short:]) == {ids["[PAD]"]}
    first = words.index(ids["[SEP]"]) + 1
    assert batch["token_type_ids"][0].tolist() == [0] * first + [1] * (short - first) + [0] * (long - short)
    assert batch["labels"].tolist() == [1, 0]
    assert data.train.batch([1])["labels"].tolist() == [0]


def test_long_pairs_are_cut_to_the_length(folder):
    data = load_glue_data(glue_config(folder, sequence_length=7))
    batch = data.train.batch(range(4))
    assert batch["input_ids"].shape[1] == 7
    assert (batch["input_ids"] == data.tokenizer.sep_token_id).sum(1).tolist() == [2] * 4, "both sentences stay"


def test_scores_are_numbers_and_single_sentences_have_one_segment(folder):
    scores = load_glue_data(glue_config(folder, task="stsb")).train.batch([0, 1])["labels"]
    assert scores.dtype == torch.float32 and scores.tolist() == [4.75, 0.0]
    single = load_glue_data(glue_config(folder, task="cola")).train.batch([0, 1])
    assert not single["token_type_ids"].any()


def test_mean_length_counts_real_tokens(folder):
    train = load_glue_data(glue_config(folder)).train
    lengths = [int(train.batch([index])["attention_mask"].sum()) for index in range(len(train))]
    assert train.mean_length() == round(sum(lengths) / len(lengths))


def test_mnli_is_evaluated_on_both_of_its_parts(folder):
    held_out = load_glue_data(glue_config(folder, task="mnli")).held_out
    assert {suffix: len(examples) for suffix, examples in held_out.items()} == {"": 3, "_mismatched": 3}
    assert not torch.equal(*(examples.batch([0])["input_ids"] for examples in held_out.values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "data.path is not set.*the one that holds RTE"),
        ({"path": "/nowhere"}, r"There is no file /nowhere/RTE/train.tsv \(seen from .*Set data.path"),
        ({"num_train": 5}, r"data.num_train is 5 but .*train.tsv has 4 examples.*set data.num_train=4"),
        ({"tokenizer": None}, "data.tokenizer is not set"),
    ],
)
def test_what_cannot_be_loaded_is_a_data_error(changes, message, folder):
    with pytest.raises(DataError, match=message):
        load_glue_data(glue_config(folder, **changes))


def _on_rank(rank: int, world_size: int, folder: Path) -> Any:
    elsewhere = {} if rank == 0 else {"path": "/nowhere", "tokenizer": "/nowhere"}
    batch = load_glue_data(glue_config(folder, **elsewhere)).train.batch([0, 1, 2, 3])
    try:
        load_glue_data(glue_config(folder, num_train=5))
    except DataError as error:
        return batch, str(error)


def test_rank_0_reads_for_all_and_its_errors_reach_all(folder):
    (first, error), (second, other_error) = run_ranks(_on_rank, 2, folder)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert error == other_error and "has 4 examples" in error
