"""SIGUSR1 to the command as a user starts it: a checkpoint, exit code 85, and the same command goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.command import ROOT, dynmoe, environment


def start(folder: Path) -> subprocess.Popen[str]:
    command = dynmoe(
        "train", "experiment=smoke", f"run_dir={folder}", "training.steps=150", "telemetry=disabled",
        "checkpoint.every_steps=50", "training.eval_every_steps=150",
    )  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.launcher
def test_sigusr1_writes_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 85, output
    assert "as asked" in output and "Traceback" not in output
    assert not psutil.wait_procs(ranks, timeout=10)[1], "processes were left behind"
    stopped = int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert 0 < stopped < 150 and not (folder / "finished.json").exists()

    process = start(folder)
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert f"Going on from {folder / 'checkpoints'}" in output
    assert json.loads((folder / "finished.json").read_text()) == {"steps": 150}
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and stopped in steps and steps[-1] == 150
