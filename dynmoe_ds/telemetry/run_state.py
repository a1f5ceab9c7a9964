"""Where a run stands, told from its folder alone: it may run on another machine, or not any more."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from dynmoe_ds.config.validate import LAUNCH_FOLDER
from dynmoe_ds.errors import EXIT_PREEMPTED, DataError
from dynmoe_ds.telemetry.run_folder import (
    CONFIG_FILE,
    FINISHED_FILE,
    LINE_FILES,
    METRICS_FILE,
    STOPPED_FILE,
    read_metrics,
)
from dynmoe_ds.telemetry.trackers import spoken_time

Word = Literal["not started", "running", "silent", "stopped", "failed", "finished"]

# A run is silent after three times its longest wait for a line, but not before this.
MIN_SILENCE_S = 60.0
_PATIENCE = 3
_RECENT_LINES = 10  # that an estimate of what is left is made from
# Of Ctrl-C, of SIGTERM and of a closed terminal.
STOP_CODES = (EXIT_PREEMPTED, 130, 143, 129)
_MAX_LETTERS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run has logged. `planned` None: not known. seconds_per_step: of late; None before two lines."""

    step: int = 0
    planned: int | None = None
    longest_wait_s: float = 0.0
    seconds_per_step: float | None = None

    def __str__(self) -> str:
        return f"step {self.step}" + (f" of {self.planned}" if self.planned is not None else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """One word, and sentences that say more."""

    word: Word
    told: str


def read_progress(run_dir: str | Path) -> Progress:
    """Raises: DataError for a line that is broken."""
    lines = read_metrics(run_dir)
    times = [float(line["time_s"]) for line in lines]
    recent = lines[-_RECENT_LINES:]
    num_steps = recent[-1]["step"] - recent[0]["step"] if recent else 0
    return Progress(
        step=lines[-1]["step"] if lines else 0,
        planned=_planned_steps(Path(run_dir)),
        longest_wait_s=max((after - before for before, after in zip([0.0, *times], times, strict=False)), default=0.0),
        seconds_per_step=(recent[-1]["time_s"] - recent[0]["time_s"]) / num_steps if num_steps > 0 else None,
    )


def read_state(run_dir: str | Path, progress: Progress | None = None) -> RunState:
    """The state as of now. progress: None to read it.

    A run that was killed leaves no word: by its silence alone it is known. Raises: as `read_progress`.
    """
    path = Path(run_dir)
    progress = read_progress(path) if progress is None else progress
    finished = finished_steps(path)
    if finished is not None and finished >= (progress.planned or 0):
        return RunState(word="finished", told=f"Finished: all {finished} steps are done.")
    if (stop := _read_stop(path)) is not None:
        code, reason = stop
        if code in STOP_CODES:
            return RunState(word="stopped", told=f"Stopped at {progress}. {reason}")
        return RunState(word="failed", told=f"Failed at {progress}. {reason}")
    if not (path / METRICS_FILE).exists():
        why = "launched, but nothing is written yet" if (path / LAUNCH_FOLDER).exists() else f"no {METRICS_FILE} yet"
        return RunState(word="not started", told=f"Not started: {why}.")
    return _of_its_lines(path, progress)


def _of_its_lines(path: Path, progress: Progress) -> RunState:
    """Running, if a line came not long ago."""
    silent_s = time.time() - _last_line_s(path)
    if silent_s > max(MIN_SILENCE_S, _PATIENCE * progress.longest_wait_s):
        waited = f", where it was {spoken_time(progress.longest_wait_s)} at most before" if progress.step else ""
        return RunState(
            word="silent",
            told=f"Silent: no new line for {spoken_time(silent_s)}{waited}. It may have been killed, or hang; its "
            f"output tells. Last: {progress}.",
        )
    if not progress.step:
        return RunState(word="running", told="Running: nothing is logged yet.")
    left = ""
    if progress.planned is not None and progress.seconds_per_step is not None:
        left_s = max(0, progress.planned - progress.step) * progress.seconds_per_step
        left = f", about {spoken_time(left_s)} left"
    return RunState(word="running", told=f"Running: {progress}{left}.")


def finished_steps(run_dir: str | Path) -> int | None:
    """The optimiser steps of the run that came to its end in this folder; None if none did.

    A mark that is cut off counts as none: the run died at its very end. Raises: DataError for one that cannot be read.
    """
    path = Path(run_dir) / FINISHED_FILE
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["steps"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Make it readable: it says whether the run has come to its end."
        ) from error


def note_stop(run_dir: str | Path, code: int, reason: str) -> None:
    """Leave word in a run folder that is there why its run ended before its end; what is noted first stays.

    reason: a sentence or more, of which the beginning is kept. A folder that cannot be written is left as it is: the
    error that ends the run must not be hidden by another.
    """
    text = " ".join(reason.split())
    text = text if len(text) <= _MAX_LETTERS else f"{text[:_MAX_LETTERS]} ..."
    with contextlib.suppress(OSError), open(Path(run_dir) / STOPPED_FILE, "x", encoding="utf-8") as file:
        file.write(json.dumps({"code": code, "reason": text}) + "\n")


def forget_stop(run_dir: str | Path) -> None:
    """For a run that goes on."""
    with contextlib.suppress(OSError):
        (Path(run_dir) / STOPPED_FILE).unlink(missing_ok=True)


def _read_stop(path: Path) -> tuple[int, str] | None:
    """None also for word of one that was refused while this run went on, which its later lines show."""
    file = path / STOPPED_FILE
    try:
        if file.stat().st_mtime < _last_line_s(path):
            return None
        noted = json.loads(file.read_text(encoding="utf-8"))
        return int(noted["code"]), str(noted["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_line_s(path: Path) -> float:
    """When a line was written last, by the clock of the disk; 0 for never."""
    return max((file.stat().st_mtime for name in LINE_FILES if (file := path / name).exists()), default=0.0)


def _planned_steps(path: Path) -> int | None:
    """From the configuration, or from that of a launch which has not begun."""
    for file in (path / CONFIG_FILE, path / LAUNCH_FOLDER / CONFIG_FILE):
        try:
            return int(yaml.safe_load(file.read_text(encoding="utf-8"))["training"]["steps"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
    return None
