"""Where a run stands, from its folder alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dynmoe_ds.telemetry.run_folder import CONFIG_FILE, FINISHED_FILE, LINE_FILES, STOPPED_FILE, RunFolder
from dynmoe_ds.telemetry.run_state import Progress, RunState, forget_stop, note_stop, read_progress, read_state


def run_with_lines(path: Path, *lines: tuple[int, float], planned: int | None = None) -> Path:
    """A run that has logged (step, time in seconds)."""
    folder = RunFolder(path)
    for step, time_s in lines:
        folder.append_metrics(step, {"train/loss": 1.0}, time_s=time_s)
    folder.close()
    if planned is not None:
        folder.write_config(f"training: {{steps: {planned}}}\n")
    return path


def aged(path: Path, age_s: float) -> Path:
    """The same run when its last line was written so long ago."""
    for name in LINE_FILES:
        os.utime(path / name, (time.time() - age_s,) * 2)
    return path


def test_progress(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == Progress()
    run = run_with_lines(tmp_path / "run", (10, 30.0), (20, 40.0), (30, 60.0), planned=90)
    assert read_progress(run) == Progress(step=30, planned=90, longest_wait_s=30.0, seconds_per_step=1.5)
    run_with_lines(run, *((step, step * 2.0) for step in range(40, 130, 10)))
    assert read_progress(run).seconds_per_step == pytest.approx((240 - 60) / 90), "of the last ten lines"
    for text in ("", "a: [", "training: 3"):
        (run / CONFIG_FILE).write_text(text)
        assert read_progress(run).planned is None


def test_what_has_not_begun(tmp_path: Path) -> None:
    assert read_state(tmp_path) == RunState(word="not started", told="Not started: no metrics.jsonl yet.")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / CONFIG_FILE).write_text("training: {steps: 7}\n")
    assert read_state(tmp_path).told == "Not started: launched, but nothing is written yet."
    assert read_progress(tmp_path).planned == 7
    run_with_lines(tmp_path)
    assert read_state(tmp_path) == RunState(word="running", told="Running: nothing is logged yet.")
    assert read_state(aged(tmp_path, 3600)).told == (
        "Silent: no new line for 1 h 0 min. It may have been killed, or hang; its output tells. Last: step 0 of 7."
    )


def test_a_run_is_silent_after_three_times_its_longest_wait(tmp_path: Path) -> None:
    quick = run_with_lines(tmp_path / "quick", (10, 5.0), (20, 8.0), planned=100)
    assert read_state(aged(quick, 40)).told == "Running: step 20 of 100, about 24 s left."
    assert read_state(aged(quick, 80)).told.startswith("Silent: no new line for 1 min 20 s, where it was 5 s at most ")
    slow = run_with_lines(tmp_path / "slow", (10, 100.0), (20, 150.0))
    assert read_state(aged(slow, 290)).word == "running" and read_state(aged(slow, 310)).word == "silent"


def test_an_end_is_told(tmp_path: Path) -> None:
    run = run_with_lines(tmp_path / "run", (10, 1.0), planned=20)
    note_stop(run, 1, "RuntimeError: a rank\nis gone " + "x" * 1000)
    note_stop(run, 143, "what is noted later follows from it")
    failed = read_state(run)
    assert failed.word == "failed" and failed.told.startswith(
        "Failed at step 10 of 20. RuntimeError: a rank is gone xx"
    )
    assert failed.told.endswith("x ...") and len(failed.told) < 500
    forget_stop(run)
    assert read_state(run).word == "running"
    forget_stop(run)
    for code in (85, 130, 143, 129):
        note_stop(run, code, "As asked.")
        assert read_state(run) == RunState(word="stopped", told="Stopped at step 10 of 20. As asked.")
        forget_stop(run)
    note_stop(run, 2, "Another one was refused.")
    os.utime(run / STOPPED_FILE, (time.time() - 60,) * 2)
    assert read_state(run).word == "running", "lines came after it"
    (run / STOPPED_FILE).write_text('{"code": ')  # cut off
    assert read_state(run).word == "running"
    (run / FINISHED_FILE).write_text(json.dumps({"steps": 20}))
    assert read_state(run) == RunState(word="finished", told="Finished: all 20 steps are done.")
    run_with_lines(run, planned=30)  # goes on with more steps
    assert read_state(run).word == "running"


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    note_stop(tmp_path / "absent", 1, "why")
    forget_stop(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
