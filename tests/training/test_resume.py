"""A run that dies is started again by the same command and ends as if it had not died."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.no_report import draw_no_report
from tests.helpers.run_config import changed, small_run
from tests.helpers.run_lines import run_lines, what_was_written
from tests.helpers.spawn import RankFailed, run_ranks

from dynmoe_ds.config.schema import CheckpointConfig, RunConfig
from dynmoe_ds.config.validate import find_faults
from dynmoe_ds.errors import DynMoEError
from dynmoe_ds.telemetry.run_state import finished_steps
from dynmoe_ds.training import run_checkpoints
from dynmoe_ds.training.run_checkpoints import Preempted
from dynmoe_ds.training.trainer import Trainer


def config(folder: Path | str, asynchronous: bool = False, **values: Any) -> RunConfig:
    """Adaptations at 4, 8 and 12, checkpoints at 3, 6, 9 and 12."""
    checkpoint = CheckpointConfig(every_steps=3, keep=2, asynchronous=asynchronous)
    return small_run(folder, parallel__num_ranks=2, parallel__ep_size=2, checkpoint=checkpoint, **values)


def train(rank: int, world_size: int, run: RunConfig, asked_after: int | None = None) -> int:
    """The step it went on from. It is asked to stop after as many steps of its own, if at all."""
    draw_no_report()
    return train_and_report(rank, world_size, run, asked_after)


def train_and_report(rank: int, world_size: int, run: RunConfig, asked_after: int | None = None) -> int:
    num_steps = itertools.count(1)
    trainer = Trainer(run, should_stop=lambda: next(num_steps) == asked_after)
    trainer.run()
    return trainer.first_step


def train_each(rank: int, world_size: int, *runs: RunConfig) -> list[int]:
    return [train_and_report(rank, world_size, run) for run in runs]


def die_at(rank: int, world_size: int, run: RunConfig, step: int) -> None:
    """Rank 1 is killed in the forward pass of optimiser step `step`, from 0."""
    trainer = Trainer(run)
    ordinary = trainer._train_step

    def train_step(at: int) -> None:
        if at == step and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ordinary(at)

    trainer._train_step = train_step  # type: ignore[method-assign]
    trainer.run()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run_ranks(train, 2, config(folder), timeout_s=120) == [0, 0]
    return folder


@pytest.mark.parametrize(("step", "resumed_from"), [(2, 0), (5, 3), (10, 9)])
def test_a_killed_run_ends_as_an_undisturbed_one(
    tmp_path: Path, undisturbed: Path, step: int, resumed_from: int
) -> None:
    folder = tmp_path / "killed"
    with pytest.raises(RankFailed):
        run_ranks(die_at, 2, config(folder), step, timeout_s=120)
    assert finished_steps(folder) is None
    assert {"config.yaml", "versions.json", "tokenizer"} <= {path.name for path in folder.iterdir()}
    assert run_ranks(train, 2, config(folder), timeout_s=120) == [resumed_from, resumed_from]
    assert what_was_written(folder) == what_was_written(undisturbed)
    assert (folder / "model" / "model.safetensors").read_bytes() == (
        undisturbed / "model" / "model.safetensors"
    ).read_bytes()
    assert (folder / "sample.txt").read_text() == (undisturbed / "sample.txt").read_text()
    assert finished_steps(folder) == 12


def test_the_undisturbed_run_did_adapt_and_keeps_two_checkpoints(undisturbed: Path) -> None:
    assert [event["step"] for event in run_lines(undisturbed, "adaptation")] == [4, 8, 12]
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == [
        "latest",
        "step-00000009",
        "step-00000012",
    ]


def test_checkpoints_in_the_background_are_the_same(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    run_ranks(train, 2, config(folder, asynchronous=True), timeout_s=120)
    assert run_lines(folder, "metrics") == run_lines(undisturbed, "metrics")
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000012\n"
    assert len(list((folder / "checkpoints").iterdir())) == 3


def test_a_finished_run_goes_on_with_more_steps_on_another_layout(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(undisturbed, folder)
    longer = small_run(folder, training__steps=15, training__micro_batch_size=8, checkpoint=config(folder).checkpoint)
    # At its last step a run is not stopped: it comes to its end.
    assert run_ranks(train, 1, longer, 3, timeout_s=120) == [12]
    steps = [line["step"] for line in run_lines(folder, "metrics")]
    assert steps == sorted(set(steps)) and steps[-1] == 15
    assert finished_steps(folder) == 15


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {f"{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changes(folder: Path, before: dict[str, bytes]) -> list[str]:
    """The files below a folder that are other ones than before, gone or new."""
    after = contents(folder)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@pytest.mark.parametrize("every_steps", [5, 50], ids=["the last steps in no checkpoint", "no checkpoint at all"])
def test_a_finished_run_is_not_run_again(tmp_path: Path, every_steps: int) -> None:
    folder = tmp_path / "finished"
    run = changed(config(folder), checkpoint__every_steps=every_steps)
    assert run_ranks(train_and_report, 2, run, timeout_s=120) == [0, 0]
    before = contents(folder)
    assert finished_steps(folder) == 12 and run_lines(folder, "metrics")[-1]["step"] == 12
    shorter = changed(run, training__steps=9)
    assert run_ranks(train_each, 2, run, shorter, timeout_s=120) == [[12, 12], [12, 12]]
    assert changes(folder, before) == []


def error_where_rank_one_cannot_list(rank: int, world_size: int, run: RunConfig) -> str:
    def fail(folder: Path) -> dict[int, Path]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if rank == 1:
        run_checkpoints.list_checkpoints = fail
    return error_of(rank, world_size, run)


def test_what_one_rank_cannot_read_every_rank_reports(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    longer = config(folder, training__steps=15)
    first, second = run_ranks(error_where_rank_one_cannot_list, 2, longer, timeout_s=120)
    assert "rank 1: CheckpointError: The checkpoints in" in first
    assert second.startswith(f"The checkpoints in {folder / 'checkpoints'} cannot be listed: Input/output error.")
    (folder / "finished.json").unlink()
    (folder / "finished.json").mkdir()
    first, second = run_ranks(error_of, 2, longer, timeout_s=120)
    assert first == second
    assert first.startswith(f"{folder / 'finished.json'} cannot be read: Is a directory.")
    (folder / "finished.json").rmdir()
    experts = folder / "experts.jsonl"
    experts.write_text("no JSON\n" + experts.read_text())
    before = contents(folder)
    first, second = run_ranks(error_of, 2, longer, timeout_s=120)
    assert first.startswith(f"{experts}, line 1: not JSON") and first in second
    assert changes(folder, before) == [], "nothing is dropped or written before everything could be read"


def test_a_folder_in_use_is_refused_unless_it_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert find_faults(config(tmp_path)) == [
        f"run_dir {str(tmp_path)!r} exists and is not empty. Choose another `run_dir`, or move that folder away."
    ]
    (tmp_path / "checkpoints").mkdir()
    assert find_faults(config(tmp_path)) == []
    never = small_run(tmp_path, checkpoint=CheckpointConfig(resume="never"))
    assert len(find_faults(never)) == 1


def test_values_that_cannot_work(tmp_path: Path) -> None:
    faults = find_faults(small_run(tmp_path / "new", checkpoint=CheckpointConfig(every_steps=0, keep=0)))
    assert faults == [
        "checkpoint.keep is 0 but must be at least 1.",
        "checkpoint.every_steps is 0 but must be at least 1.",
    ]


def error_of(rank: int, world_size: int, run: RunConfig) -> str:
    try:
        Trainer(run)
    except DynMoEError as error:
        return f"{error}"
    return ""


@pytest.mark.parametrize("value", [{"model__hidden_size": 48}, {"data__vocab_size": 420}], ids=str)
def test_another_model_in_the_same_folder_is_refused(tmp_path: Path, undisturbed: Path, value: dict[str, int]) -> None:
    folder = tmp_path / "wider"
    shutil.copytree(undisturbed, folder)
    for error in run_ranks(error_of, 2, config(folder, training__steps=15, **value), timeout_s=120):
        assert "is of another model" in error and "move" not in error, error
    assert changes(folder, contents(undisturbed)) == []


def first_step(rank: int, world_size: int, run: RunConfig) -> int:
    return Trainer(run).first_step


def damage(checkpoint: Path) -> None:
    """One bit of a file that is checked by one of two ranks."""
    path = checkpoint / "rank_00001.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_refused_with_what_to_do(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(undisturbed, folder)
    newest, before = (folder / "checkpoints" / f"step-000000{step}" for step in ("12", "09"))
    damage(newest)
    longer, files = config(folder, training__steps=15), contents(folder)
    for error in run_ranks(error_of, 2, longer, timeout_s=120):
        assert "rank_00001.pt has changed since it was written" in error, error
        assert error.endswith(
            f"To go on without it, move {newest} away: the same command then goes on from {before.name}."
        )
    assert changes(folder, files) == []

    newest.rename(tmp_path / newest.name)
    damage(before)
    for error in run_ranks(error_of, 2, longer, timeout_s=120):
        assert error.endswith(f"move {before} away: the same command then begins anew, since there is no other.")
    shutil.rmtree(before)
    shutil.copytree(undisturbed / "checkpoints" / before.name, before)
    assert run_ranks(first_step, 2, longer, timeout_s=120) == [9, 9]


def be_preempted(rank: int, world_size: int, run: RunConfig) -> str:
    draw_no_report()
    steps = 0

    def should_stop() -> bool:
        nonlocal steps
        steps += 1
        return rank == 1 and steps == 5

    try:
        Trainer(run, should_stop=should_stop).run()
    except Preempted as stopped:
        return f"{stopped}"
    return "not stopped"


def test_a_run_that_one_rank_is_asked_to_stop_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "preempted"
    want = f"Stopped after optimiser step 5, as asked. {folder / 'checkpoints' / 'step-00000005'} was written."
    assert run_ranks(be_preempted, 2, config(folder), timeout_s=120) == [want, want]
    assert finished_steps(folder) is None
    assert run_ranks(train, 2, config(folder), timeout_s=120) == [5, 5]
    assert run_lines(folder, "adaptation") == run_lines(undisturbed, "adaptation")
    model = "model/model.safetensors"
    assert (folder / model).read_bytes() == (undisturbed / model).read_bytes()
    steps = [line["step"] for line in run_lines(undisturbed, "metrics")]
    assert [line["step"] for line in run_lines(folder, "metrics")] == sorted({*steps, 5})


def fail_to_save(rank: int, world_size: int, run: RunConfig) -> None:
    draw_no_report()
    trainer = Trainer(run)
    folder = trainer.checkpoints.folder
    ordinary = trainer._train_step

    def train_step(at: int) -> None:
        if rank == 0 and at == 3:  # after the first checkpoint something takes its place
            folder.rename(folder.with_name("aside"))
            folder.write_text("in the way")
        if rank == 0 and at == 7:
            folder.unlink()
            folder.with_name("aside").rename(folder)
        ordinary(at)

    trainer._train_step = train_step  # type: ignore[method-assign]
    trainer.run()


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "full"
    run_ranks(fail_to_save, 2, config(folder), timeout_s=120)
    assert run_lines(folder, "metrics") == run_lines(undisturbed, "metrics")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["latest", "step-00000009", "step-00000012"]
