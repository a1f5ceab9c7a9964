"""Starts a small run, kills a part of it at a random moment, starts it again: until it has come to its end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dynmoe_ds.telemetry import is_of_the_machine

ROOT = Path(__file__).parent.parent.parent
STEPS = 60
# Adaptations after 10, 20, ...: an elastic pool that grows, shrinks and moves experts. A checkpoint every fourth step.
COMMAND = (
    "experiment=smoke", f"training.steps={STEPS}", "training.save_model=true", "telemetry=disabled",
    "adaptation.last_growth_step=40", "checkpoint.every_steps=4", "training.log_every_steps=4",
    "training.eval_every_steps=20", "parallel.process_group_timeout_s=30",
)  # fmt: skip
START_LIMIT_S, END_LIMIT_S = 180.0, 90.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One kill and what followed. moment: `start`, `training` or `save`; in_save: a save was half-done right after it.

    logged_step: the last step in the log then. latest: the step of the newest checkpoint. code: the exit code of
    `dynmoe train`. gone_s: seconds until no process was left; left_behind: processes that had to be stopped then.
    """

    run: int
    signal: str
    victim: str
    moment: str
    in_save: bool
    logged_step: int
    latest: int
    code: int
    gone_s: float
    left_behind: int


class Attempt:
    """`dynmoe train` on two ranks, as a user starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        self._log = (folder.parent / f"{folder.name}.log").open("a")
        command = [sys.executable, "-m", "dynmoe_ds", "train", *COMMAND, f"run_dir={folder}"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._first_step = logged_step(folder)

    def members(self) -> dict[str, psutil.Process]:
        """The processes there are: `command`, `launcher` and `rank 0`, `rank 1`."""
        found = {}
        for process in self._everyone():
            try:
                rank = process.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None:
                found[f"rank {rank}"] = process
            elif "deepspeed.launcher.launch" in _command_line(process):
                found["launcher"] = process
            elif process.pid == self.process.pid:
                found["command"] = process
        return found

    def wait_for(self, moment: str, delay_s: float) -> bool:
        """Wait until `delay_s` after the beginning of a moment; False if the run ended before."""
        deadline = time.monotonic() + START_LIMIT_S
        while not self._has_begun(moment):
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder} did not come to {moment!r} within {START_LIMIT_S} s")
            time.sleep(0.002)
        time.sleep(delay_s)
        return self.process.poll() is None

    def end(self) -> tuple[int, float, int]:
        """Wait for the end: exit code, seconds until nobody was left, processes that had to be stopped."""
        began = time.monotonic()
        try:
            self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        while (alive := self._everyone()) and time.monotonic() - began < END_LIMIT_S:
            time.sleep(0.1)
        gone_s = time.monotonic() - began
        for process in alive:
            process.kill()
        self._log.close()
        return self.process.wait(), gone_s, len(alive)

    def _everyone(self) -> list[psutil.Process]:
        """Every process of the run, also one whose parent is gone: all have the run's folder in their command line."""
        mark = f"run_dir={self.folder}"
        return [process for process in psutil.process_iter() if mark in _command_line(process)]

    def _has_begun(self, moment: str) -> bool:
        if moment == "start":
            return "rank 1" in self.members()
        if moment == "save":
            return any(self.folder.glob("checkpoints/.step-*.incomplete"))
        return logged_step(self.folder) > self._first_step


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def logged_step(folder: Path) -> int:
    """The last step in the log of a run; 0 without one."""
    return max((line["step"] for line in read_lines(folder / "metrics.jsonl")), default=0)


def latest_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    try:
        return int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))
    except OSError:
        return 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except OSError:
        return []


def run_and_kill(folder: Path, number: int, num_kills: int, training_s: float, draw: random.Random) -> Iterator[Kill]:
    """One run that is killed `num_kills` times before it may come to its end.

    training_s: how long an undisturbed run trains. Raises: RuntimeError if the last attempt does not come to its end.
    """
    for index in range(num_kills):
        # The run has gone some way already: what is left of it is what a moment can be drawn from.
        share_left = 1 - latest_step(folder) / STEPS
        moment = draw.choices(("start", "training", "save"), (1, 5, 4))[0]
        delay_s = {"start": 6.0, "training": 0.8 * training_s * share_left / (num_kills - index), "save": 0.04}[moment]
        victim, number_of_signal = draw.choices(
            (("rank", signal.SIGKILL), ("rank", signal.SIGTERM), ("rank", signal.SIGUSR1),
             ("launcher", signal.SIGKILL), ("command", signal.SIGKILL), ("command", signal.SIGTERM)),
            (12, 1, 1, 1, 1, 1),
        )[0]  # fmt: skip
        victim = f"rank {draw.randrange(2)}" if victim == "rank" else victim
        attempt = Attempt(folder)
        if not attempt.wait_for(moment, draw.uniform(0, delay_s)) or victim not in (members := attempt.members()):
            attempt.end()
            continue
        try:
            members[victim].send_signal(number_of_signal)
        except psutil.NoSuchProcess:  # it has ended this very moment
            attempt.end()
            continue
        in_save = any(folder.glob("checkpoints/.step-*.incomplete"))
        step, latest = logged_step(folder), latest_step(folder)
        code, gone_s, left_behind = attempt.end()
        yield Kill(
            run=number, signal=signal.Signals(number_of_signal).name, victim=victim, moment=moment, in_save=in_save,
            logged_step=step, latest=latest, code=code, gone_s=round(gone_s, 1), left_behind=left_behind,
        )  # fmt: skip
    finish(folder)


def finish(folder: Path) -> None:
    """Let a run come to its end. Raises: RuntimeError if it does not."""
    attempt = Attempt(folder)
    attempt.process.wait()
    code, _, left_behind = attempt.end()
    if code != 0 or left_behind or not (folder / "finished.json").is_file():
        raise RuntimeError(f"{folder} ended with code {code} and left {left_behind} processes; see {folder}.log")


def differences(folder: Path, undisturbed: Path) -> list[str]:
    """What a run wrote otherwise than an undisturbed one, clocks apart; empty for nothing.

    A run that is asked to stop logs the step at which it does. The means over the steps around it are other means then,
    and so are the loads; only what was measured at one step is compared.
    """
    found = []
    for name in ("model/model.safetensors", "sample.txt"):
        if (folder / name).read_bytes() != (undisturbed / name).read_bytes():
            found.append(name)
    if read_lines(folder / "adaptation.jsonl") != read_lines(undisturbed / "adaptation.jsonl"):
        found.append("adaptation.jsonl")
    here, there = (_by_step(run / "metrics.jsonl") for run in (folder, undisturbed))
    if missing := there.keys() - here.keys():
        found.append(f"metrics.jsonl lacks steps {sorted(missing)}")
    for step in sorted(there.keys() & here.keys()):
        (before, line), (other_before, other) = here[step], there[step]
        is_mean_of_same = before == other_before
        keys = [key for key in other if not is_of_the_machine(key) and (is_mean_of_same or key.startswith("eval/loss"))]
        found += [f"{key} at step {step}" for key in keys if line.get(key) != other[key]]
    here, there = (_by_step(run / "experts.jsonl") for run in (folder, undisturbed))
    if missing := there.keys() - here.keys():
        found.append(f"experts.jsonl lacks steps {sorted(missing)}")
    for step in sorted(there.keys() & here.keys()):
        (before, line), (other_before, other) = here[step], there[step]
        if before == other_before and line != other:
            found.append(f"experts.jsonl at step {step}")
    return found


def _by_step(path: Path) -> dict[int, tuple[int, dict[str, Any]]]:
    """Lines by step, each with the step of the line before."""
    lines = read_lines(path)
    befores = [0, *(line["step"] for line in lines)]
    return {line["step"]: (before, line) for before, line in zip(befores, lines, strict=False)}
