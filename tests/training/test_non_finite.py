"""NaN in a run: it stops, leaves out the step, or goes back to its latest checkpoint first; also if it is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from tests.helpers.no_report import draw_no_report
from tests.helpers.run_config import small_run
from tests.helpers.run_lines import run_lines, what_was_written
from tests.helpers.spawn import RankFailed, run_ranks

from dynmoe_ds.checkpoint import writer
from dynmoe_ds.config.schema import CheckpointConfig, RunConfig
from dynmoe_ds.config.validate import find_faults
from dynmoe_ds.errors import NonFiniteError
from dynmoe_ds.telemetry.run_state import finished_steps
from dynmoe_ds.training.trainer import Trainer

SPOILT = (1, 7)
"""Steps, from 0, whose batch is spoilt on rank 1: one before the first checkpoint, and the last of a window."""


def config(folder: Path | str, policy: str, log_every_steps: int = 1) -> RunConfig:
    """Adaptations after steps 4, 8 and 12, checkpoints after 3, 6, 9 and 12, log lines after every step or as said.

    A short text, since the tokenizer is learnt anew in every run.
    """
    text = Path(folder).with_name("text.txt")
    if not text.exists():
        text.write_text("".join(list(topics.values())[:8]))
    return small_run(
        folder,
        data__name="text_file",
        data__path=f"{text}",
        training__sample_prompt="",
        training__sample_tokens=0,
        parallel__num_ranks=2,
        parallel__ep_size=2,
        parallel__zero_stage=2,
        training__log_every_steps=log_every_steps,
        training__on_non_finite=policy,
        checkpoint=CheckpointConfig(every_steps=3, keep=2),
    )


def spoilt(run: RunConfig, rank: int, spoil: Callable[[Trainer, int], None]) -> Trainer:
    """A trainer on whose rank 1 `spoil` is called before every step. Its run draws no report."""
    draw_no_report()
    trainer = Trainer(run)
    ordinary = trainer._train_step

    def train_step(step: int) -> None:
        if rank == 1:
            spoil(trainer, step)
        ordinary(step)

    trainer._train_step = train_step  # type: ignore[method-assign]
    return trainer


def spoil_batches(steps: Collection[int]) -> Callable[[Trainer, int], None]:
    """The embedding of one token is NaN in these steps, whenever they are taken."""
    current = [-1]

    def embed(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if current[0] not in steps or not module.training:
            return output
        return output.index_fill(1, torch.tensor([2]), float("nan"))

    def spoil(trainer: Trainer, step: int) -> None:
        embedding = trainer.engine.module.get_input_embeddings()
        if current[0] < 0:
            embedding.register_forward_hook(embed)
        current[0] = step

    return spoil


def break_a_weight_once(at: int) -> Callable[[Trainer, int], None]:
    """As a fault of the machine does it: a weight is infinite from step `at` on until it is read from disk again."""
    is_done = [False]

    def spoil(trainer: Trainer, step: int) -> None:
        if step == at and not is_done[0]:
            is_done[0] = True
            next(trainer.engine.module.parameters()).data.view(-1)[7] = float("inf")

    return spoil


def error_of(trainer: Trainer) -> str:
    try:
        trainer.run()
    except NonFiniteError as error:
        return f"{error}"
    return ""


def all_runs(rank: int, world_size: int, folder: str) -> dict[str, str]:
    def run(name: str, policy: str, spoil: Callable[[Trainer, int], None], log_every_steps: int = 1) -> str:
        return error_of(spoilt(config(f"{folder}/{name}", policy, log_every_steps), rank, spoil))

    return {
        "skipped": run("skipped", "skip_step", spoil_batches(SPOILT)),
        "rolled back": run("rolled back", "roll_back", spoil_batches(SPOILT)),
        "undisturbed": run("undisturbed", "roll_back", spoil_batches(()), 5),
        "repaired": run("repaired", "roll_back", break_a_weight_once(7), 5),  # a step after the last log line
        "stopped": run("stopped", "stop", spoil_batches(SPOILT)),
        "broken": run("broken", "skip_step", break_a_weight_once(7)),
        "hopeless": run("hopeless", "roll_back", spoil_batches(range(4, 12))),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("runs")
    config(folder / "any", "stop")  # writes the text
    errors, of_other_rank = run_ranks(all_runs, 2, f"{folder}", timeout_s=180)
    assert errors == of_other_rank
    return folder, errors


def assert_same(a: Path, b: Path) -> None:
    assert what_was_written(a) == what_was_written(b)
    model = "model/model.safetensors"
    assert (a / model).read_bytes() == (b / model).read_bytes()


def test_a_run_that_went_back_ends_as_one_that_left_out_the_step(runs: tuple[Path, dict[str, str]]) -> None:
    folder, errors = runs
    assert (errors["skipped"], errors["rolled back"], errors["undisturbed"]) == ("", "", "")
    assert_same(folder / "rolled back", folder / "skipped")
    skipped = [line["train/skipped_steps"] for line in run_lines(folder / "skipped", "metrics")]
    assert skipped == [0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert run_lines(folder / "skipped", "adaptation")[1]["step"] == 8, "the spoilt step's adaptation took place"
    model = "model/model.safetensors"
    assert (folder / "skipped" / model).read_bytes() != (folder / "undisturbed" / model).read_bytes()


def test_nothing_of_a_spoilt_step_is_in_the_log(runs: tuple[Path, dict[str, str]]) -> None:
    for line in run_lines(runs[0] / "skipped", "metrics"):
        assert None not in line.values(), line
    by_step = {line["step"]: line for line in run_lines(runs[0] / "skipped", "metrics")}
    of_updates = {"train/loss", "train/aux_loss", "train/gradient_norm"}
    assert not of_updates & by_step[2].keys() and of_updates <= by_step[3].keys()


def test_a_fault_that_does_not_come_again_leaves_no_trace(runs: tuple[Path, dict[str, str]]) -> None:
    folder, errors = runs
    assert errors["repaired"] == ""
    assert_same(folder / "repaired", folder / "undisturbed")


def test_a_run_that_stops_says_where_and_keeps_its_checkpoints(runs: tuple[Path, dict[str, str]]) -> None:
    folder, errors = runs
    assert errors["stopped"].startswith("NaN in optimiser step 2, on rank 1 of 2: the input of model.layers.1.mlp,")
    assert finished_steps(folder / "stopped") is None
    assert "Weights hold NaN or infinity themselves: model.embed_tokens.weight on rank 1." in errors["broken"]
    assert "go back to a checkpoint" in errors["broken"]
    assert (folder / "broken" / "checkpoints" / "latest").read_text() == "step-00000006\n"


def fail_while_saving(rank: int, world_size: int, run: RunConfig) -> tuple[str, str, list[str]]:
    """The error of a run that ends right after a save has begun that takes two seconds, and what is there then."""
    slow = writer.write_checkpoint

    def write_slowly(*args: Any) -> Path:
        time.sleep(2.0)
        return slow(*args)

    writer.write_checkpoint = write_slowly
    error = error_of(spoilt(run, rank, break_a_weight_once(3)))
    folder = Path(run.run_dir) / "checkpoints"
    latest = folder / "latest"
    return error, latest.read_text() if latest.exists() else "", sorted(p.name for p in folder.iterdir())


def test_the_save_in_the_background_is_not_lost_by_a_run_that_ends(tmp_path: Path) -> None:
    run = config(tmp_path / "run", "stop")
    for error, latest, names in run_ranks(fail_while_saving, 2, run, timeout_s=120):
        assert error.startswith(("NaN in optimiser step 4", "Infinity in optimiser step 4")), error
        assert latest == "step-00000003\n", names


def test_a_run_does_not_go_back_for_ever(runs: tuple[Path, dict[str, str]]) -> None:
    error = runs[1]["hopeless"]
    assert error.startswith("NaN in optimiser step 8,") and error.endswith("rolled back 3 times already."), error


def die_in_a_replay(rank: int, world_size: int, run: RunConfig) -> None:
    """Rank 1 is killed when step 7 is taken a second time, after it had been rolled back from."""
    spoil, taken = spoil_batches(SPOILT), []

    def spoil_or_die(trainer: Trainer, step: int) -> None:
        taken.append(step)
        if taken.count(7) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        spoil(trainer, step)

    spoilt(run, rank, spoil_or_die).run()


def go_on(rank: int, world_size: int, run: RunConfig) -> int:
    trainer = spoilt(run, rank, spoil_batches(SPOILT))
    trainer.run()
    return trainer.first_step


def test_a_run_that_is_killed_in_a_replay_meets_the_fault_again(
    tmp_path: Path, runs: tuple[Path, dict[str, str]]
) -> None:
    run = config(tmp_path / "killed", "roll_back")
    with pytest.raises(RankFailed):
        run_ranks(die_in_a_replay, 2, run, timeout_s=120)
    assert run_ranks(go_on, 2, run, timeout_s=120) == [6, 6]
    assert_same(tmp_path / "killed", runs[0] / "skipped")


def test_without_checkpoints_there_is_nothing_to_go_back_to() -> None:
    assert find_faults(small_run(training__on_non_finite="roll_back")) == [
        "training.on_non_finite is roll_back but checkpoint.every_steps is null, so that there is nothing to go back "
        "to. Set checkpoint.every_steps, or use training.on_non_finite=skip_step."
    ]
    assert find_faults(small_run(training__on_non_finite="skip_step")) == []
