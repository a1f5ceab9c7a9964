"""A run that really trains, and `dynmoe watch` beside it, as a reader sees it from before its start to its end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.browser.chromium import Chromium
from tests.helpers.command import Started, dynmoe
from tests.helpers.run_lines import last_step

pytestmark = [pytest.mark.browser, pytest.mark.launcher]

STEPS = 100
TIMEOUT_S = 120


@contextmanager
def started(output: Path, *words: str) -> Iterator[Started]:
    """The command with its output in a file; nothing that it started is left at the end."""
    command = Started(dynmoe(*words), output)
    try:
        yield command
    finally:
        command.kill()


def rank_of(command: Started) -> psutil.Process:
    return next(one for one in command.look() if "RANK" in one.environ())


def wait_for_steps(run: Path, number: int, command: Started) -> None:
    wanted = last_step(run) + number
    command.wait_until(lambda: last_step(run) >= wanted, TIMEOUT_S, every_s=0.01)


def test_the_page_moves_on_with_the_run_and_says_when_it_has_finished(chromium: Chromium, tmp_path: Path) -> None:
    run, said, watched = tmp_path / "run", tmp_path / "train.txt", tmp_path / "watch.txt"
    run.mkdir()
    short = [f"training.steps={STEPS}", "training.log_every_steps=1", f"training.eval_every_steps={STEPS}"]
    with started(watched, "watch", f"{run}", "--every", "2") as watch:
        watch.wait_until(lambda: "http://" in watched.read_text(), TIMEOUT_S)
        chromium.open(re.findall(r"http://\S+", watched.read_text())[0])
        chromium.wait_for("Not started: no metrics.jsonl yet.")
        with started(
            said, "train", "experiment=smoke", "parallel=single", f"run_dir={run}", "telemetry=disabled", *short
        ) as train:
            # The run stands still while the page is read, or it might be over before.
            for _ in range(2):
                wait_for_steps(run, 3, train)
                rank = rank_of(train)
                rank.suspend()
                chromium.wait_for(f"Running: step {last_step(run)} of {STEPS}, about")
                rank.resume()
            assert train.process.wait(timeout=TIMEOUT_S) == 0, said.read_text()
        chromium.wait_for(f"Finished: all {STEPS} steps are done.")
    assert chromium.run("document.images.length") > 5
    assert "Births and deaths" in chromium.text()
    assert chromium.complaints() == []
