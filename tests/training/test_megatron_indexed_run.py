"""A run on Megatron's indexed data sets, which stops in the middle of an epoch and goes on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.megatron import needs_megatron, word_tokenizer
from tests.helpers.no_report import draw_no_report
from tests.helpers.run_config import small_run
from tests.helpers.run_lines import run_lines
from tests.helpers.spawn import run_ranks

from dynmoe_ds.cli.main import main
from dynmoe_ds.config.schema import MegatronIndexedConfig, RunConfig
from dynmoe_ds.training import Trainer
from dynmoe_ds.training.run_checkpoints import Preempted

# Data sets of 24 and of 12 documents, whose words no other has.
BOOKS = [" ".join(f"{4 * number + word % 4}" for word in range(23)) for number in range(24)]
WEB = [" ".join(f"{100 + 8 * number + word % 8}" for word in range(23)) for number in range(12)]
STEPS, STOPPED_AFTER = 8, 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `data.` has to say of two data sets, one of which weighs three times as much."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = word_tokenizer(folder / "tokenizer")
    for name, texts in (("books", BOOKS), ("web", WEB)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        out = ["--tokenizer", tokenizer, "--out", f"{folder / name}"]
        assert main(["data", "index", f"{folder / name}.jsonl", *out]) == 0
    paths = (f"{folder / 'books'}", f"{folder / 'web'}")
    return {"paths": paths, "weights": (0.75, 0.25), "tokenizer": tokenizer}


def config(folder: Path, corpus: dict[str, Any]) -> RunConfig:
    return small_run(
        folder,
        data=MegatronIndexedConfig(**corpus, sequence_length=24, held_out_fraction=0.2),
        parallel__num_ranks=2,
        parallel__ep_size=2,
        training__steps=STEPS,
        training__micro_batch_size=2,
        training__log_every_steps=1,
        training__eval_every_steps=STEPS,
        training__eval_sequences=2,
        training__sample_tokens=0,
        training__save_model=False,
    )


def train(rank: int, world_size: int, undisturbed: RunConfig, stopped: RunConfig) -> dict[str, Any]:
    draw_no_report()
    read: list[list[int]] = []

    def run(trainer: Trainer) -> Trainer:
        batch = trainer.task.train.batch

        def noting(*arguments: Any, **options: Any) -> Any:
            found = batch(*arguments, **options)
            read.extend(found["input_ids"].tolist())
            return found

        trainer.task.train.batch = noting
        trainer.run()
        return trainer

    windows = len(run(Trainer(undisturbed)).task.train)
    whole, read = read, []
    steps = itertools.count(1)
    with pytest.raises(Preempted):
        run(Trainer(stopped, should_stop=lambda: next(steps) == STOPPED_AFTER))
    first_step = run(Trainer(stopped)).first_step
    return {"windows": windows, "whole": whole, "in two parts": read, "first_step": first_step}


@needs_megatron
def test_a_run_that_stopped_in_mid_epoch_ends_as_if_it_had_not(tmp_path: Path, corpus: dict[str, Any]) -> None:
    undisturbed, stopped = (config(tmp_path / name, corpus) for name in ("undisturbed", "stopped"))
    ranks = run_ranks(train, 2, undisturbed, stopped, timeout_s=120)
    for rank in ranks:
        assert rank["first_step"] == STOPPED_AFTER
        assert rank["in two parts"] == rank["whole"] and len(rank["whole"]) == 2 * STEPS
        assert 0 < 4 * STOPPED_AFTER < rank["windows"] < 4 * STEPS, "in the first of two epochs"
    first, again = (run_lines(run.run_dir, "metrics") for run in (undisturbed, stopped))
    assert again == first
    losses = [line["train/loss"] for line in first if "train/loss" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    of_books = sum(row[0] < 100 for rank in ranks for row in rank["whole"])
    assert of_books == pytest.approx(0.75 * 4 * STEPS, abs=2)
