"""The nine tasks of GLUE: where each keeps its sentences and labels, and how it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True, kw_only=True, slots=True)
class GlueTask:
    """One task as the GLUE download lays it out: tab-separated files without quoting.

    folder: its folder in the download. sentences: the columns of its one or two sentences. label: the column of the
    label. classes: the labels in the order of the model's outputs; empty for regression. metrics: GLUE's own, by the
    names of `training.metrics`. columns: all columns of a file without a header row; None where the first row names
    them. held_out: the files to evaluate on, by the suffix of their metrics. has_broken_rows: rows of another number of
    columns are skipped, because the download itself has them.
    """

    folder: str
    sentences: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    held_out: Mapping[str, str] = field(default_factory=lambda: {"": "dev.tsv"})
    has_broken_rows: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.classes

    @property
    def num_outputs(self) -> int:
        """Outputs of the model: one per class, or one number."""
        return max(len(self.classes), 1)


# Source: gluebenchmark.com/tasks and the files of its download, https://dl.fbaipublicfiles.com/glue/data/.
GLUE_TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        folder="CoLA",
        columns=("source", "label", "annotation", "sentence"),
        sentences=("sentence",),
        label="label",
        classes=("0", "1"),
        metrics=("matthews",),
    ),
    "sst2": GlueTask(folder="SST-2", sentences=("sentence",), label="label", classes=("0", "1"), metrics=("accuracy",)),
    "mrpc": GlueTask(
        folder="MRPC",
        sentences=("#1 String", "#2 String"),
        label="Quality",
        classes=("0", "1"),
        metrics=("accuracy", "f1"),
    ),
    "qqp": GlueTask(
        folder="QQP",
        sentences=("question1", "question2"),
        label="is_duplicate",
        classes=("0", "1"),
        metrics=("accuracy", "f1"),
        # Some of its questions hold a line break or a tab. fairseq, jiant and Hugging Face skip these rows too.
        has_broken_rows=True,
    ),
    "stsb": GlueTask(
        folder="STS-B",
        sentences=("sentence1", "sentence2"),
        label="score",
        classes=(),
        metrics=("pearson", "spearman"),
    ),
    "mnli": GlueTask(
        folder="MNLI",
        sentences=("sentence1", "sentence2"),
        label="gold_label",
        classes=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        held_out={"": "dev_matched.tsv", "_mismatched": "dev_mismatched.tsv"},
    ),
    "qnli": GlueTask(
        folder="QNLI",
        sentences=("question", "sentence"),
        label="label",
        classes=_ENTAILMENT,
        metrics=("accuracy",),
    ),
    "rte": GlueTask(
        folder="RTE",
        sentences=("sentence1", "sentence2"),
        label="label",
        classes=_ENTAILMENT,
        metrics=("accuracy",),
    ),
    "wnli": GlueTask(
        folder="WNLI",
        sentences=("sentence1", "sentence2"),
        label="label",
        classes=("0", "1"),
        metrics=("accuracy",),
    ),
}
