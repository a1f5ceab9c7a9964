"""A run that really trains, and `dynmoe watch` beside it, as a reader sees it from before its start to its end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.browser.chromium import Chromium

pytestmark = [pytest.mark.browser, pytest.mark.launcher]

ROOT = Path(__file__).parent.parent.parent
STEPS = 100
TIMEOUT_S = 120


@contextmanager
def dynmoe(output: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command with its output in a file; nothing that it started is left at the end."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "dynmoe_ds", *words]
    with (
        output.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                for below in psutil.Process(process.pid).children(recursive=True):
                    below.kill()
                process.kill()


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    whole = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    return int(json.loads(whole[-1])["step"]) if whole else 0


def rank_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    return next(one for one in psutil.Process(process.pid).children(recursive=True) if "RANK" in one.environ())


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes], output: Path) -> None:
    end = time.monotonic() + TIMEOUT_S
    while last_step(run) < step:
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.01)


def test_the_page_moves_on_with_the_run_and_says_when_it_has_finished(chromium: Chromium, tmp_path: Path) -> None:
    run, said, watched = tmp_path / "run", tmp_path / "train.txt", tmp_path / "watch.txt"
    run.mkdir()
    short = [f"training.steps={STEPS}", "training.log_every_steps=1", f"training.eval_every_steps={STEPS}"]
    with dynmoe(watched, "watch", f"{run}", "--every", "2") as watch:
        end = time.monotonic() + TIMEOUT_S
        while not (address := re.search(r"http://\S+", watched.read_text())):
            assert watch.poll() is None and time.monotonic() < end, watched.read_text()
            time.sleep(0.1)
        chromium.open(address[0])
        chromium.wait_for("Not started: no metrics.jsonl yet.")
        with dynmoe(
            said, "train", "experiment=smoke", "parallel=single", f"run_dir={run}", "telemetry=disabled", *short
        ) as train:
            # The run stands still while the page is read, or it might be over before.
            shown = []
            for _ in range(2):
                wait_for_step(run, last_step(run) + 3, train, said)
                rank = rank_of(train)
                rank.suspend()
                shown.append(last_step(run))
                chromium.wait_for(f"Running: step {shown[-1]} of {STEPS}, about")
                rank.resume()
            assert 3 <= shown[0] < shown[1] < STEPS
            assert train.wait(timeout=TIMEOUT_S) == 0, said.read_text()
        chromium.wait_for(f"Finished: all {STEPS} steps are done.")
    assert chromium.run("document.images.length") > 5
    assert "Births and deaths" in chromium.text()
    assert chromium.complaints() == []
