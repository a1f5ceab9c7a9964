"""The folder that a run leaves behind: what it was, what it logged, and how its experts lived."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.telemetry.events import EventDict, event_fault

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
MODEL_FILE = "model.json"
METRICS_FILE = "metrics.jsonl"
EXPERTS_FILE = "experts.jsonl"
ADAPTATION_FILE = "adaptation.jsonl"
SAMPLE_FILE = "sample.txt"
ANSWERS_FILE = "answers.png"
CHECKPOINT_FOLDER = "checkpoints"
FINISHED_FILE = "finished.json"
STOPPED_FILE = "stopped.json"
SWEEP_FILE = "sweep.tsv"  # beside the run folders of a sweep
LINE_FILES = (METRICS_FILE, EXPERTS_FILE, ADAPTATION_FILE)

PACKAGES = {"torch": "torch", "deepspeed": "deepspeed", "transformers": "transformers", "dynmoe_ds": "dynmoe-ds"}
GIT_TIMEOUT_S = 5


class RunFolder:
    """Writes a run's files; rank 0 only. Opening a folder again appends to what is there.

    Every line reaches the operating system before the call returns, so a crash of the process loses at most the line
    it was writing; opening the folder again removes such a half line. NaN and infinity are written as null, because
    JSON has neither.

    Raises: ConfigError where the path is a file; DataError where the lines of an earlier run cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir is {self.path}, which is a file. Give the path of a folder.")
        self.path.mkdir(parents=True, exist_ok=True)
        earlier = read_metrics(self.path)  # before anything is changed: it may raise
        for name in LINE_FILES:
            _repair_last_line(self.path / name)
        self._time_before_s = float(earlier[-1]["time_s"]) if earlier else 0.0
        self._opened_s = time.monotonic()
        self._files = {name: _open_for_append(self.path / name) for name in LINE_FILES}

    def elapsed_s(self) -> float:
        """Seconds of this run so far, counting on from the last line of an earlier part of it."""
        return self._time_before_s + time.monotonic() - self._opened_s

    def write_config(self, yaml_text: str) -> None:
        """Write the resolved configuration."""
        (self.path / CONFIG_FILE).write_text(yaml_text, encoding="utf-8")

    def write_versions(self) -> None:
        """Write the versions of everything that shapes the result."""
        (self.path / VERSIONS_FILE).write_text(json.dumps(collect_versions(), indent=2) + "\n", encoding="utf-8")

    def write_sample(self, text: str) -> None:
        """Write the text that the trained model generated."""
        (self.path / SAMPLE_FILE).write_text(text, encoding="utf-8")

    def append_metrics(self, step: int, values: Mapping[str, float], time_s: float | None = None) -> None:
        """Append one line of metric values by name. `time_s` None takes the clock."""
        time_s = self.elapsed_s() if time_s is None else time_s
        self._append(METRICS_FILE, {"step": step, "time_s": round(time_s, 3), **values})

    def append_experts(self, step: int, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Append one line of loads: `{layer: {"load": {expert id: tokens}, "num_tokens": int, "num_unrouted": int}}`.

        `load` has every live expert, with 0 for one that nobody chose, and covers the steps since the last such line.
        Where ranks share a layer's experts there is `"rows_per_rank": [int, ...]` as well: what each rank of an
        expert-parallel group computed, all replicas of the group together.
        """
        self._append(EXPERTS_FILE, {"step": step, "layers": layers})

    def append_adaptation(self, event: EventDict) -> None:
        """Append one adaptation event (its fields: `dynmoe_ds.telemetry.events`)."""
        fault = event_fault(event)
        assert fault is None, f"{fault}: {event}"
        self._append(ADAPTATION_FILE, event)

    def rewind(self, step: int) -> None:
        """Drop every line after `step`, for a run that resumes from a checkpoint of that step.

        Without it the steps between the checkpoint and the crash would stand in the files twice.
        Raises: DataError for a line that cannot be read, with every file as it was.
        """
        lines = {name: _read_lines(self.path / name, _any_fault) for name in LINE_FILES}
        for name, file in self._files.items():
            file.close()
            aside = self.path / f"{name}.new"
            aside.write_bytes(b"".join(_encode(line) for line in lines[name] if line["step"] <= step))
            aside.replace(self.path / name)
        self._files = {name: _open_for_append(self.path / name) for name in LINE_FILES}

    def close(self) -> None:
        """Close the files; calling it twice does nothing."""
        for file in self._files.values():
            file.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        self._files[name].write(_encode(line))
        self._files[name].flush()


def collect_versions() -> dict[str, Any]:
    """Versions of Python, the packages and the platform, and the git commit of this package; null where unknown."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name, distribution in PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["platform"] = platform.platform()
    versions["git_commit"], versions["git_has_changes"] = _git_state(Path(__file__).resolve().parents[1])
    return versions


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a value that was NaN or infinite is None. Empty where there is no file.

    Raises: DataError naming file and line for a line that is broken, other than a half-written last one.
    """
    return _read_lines(Path(run_dir) / METRICS_FILE, _metrics_fault)


def read_experts(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `experts.jsonl`; empty where there is no file. Raises: DataError as `read_metrics`."""
    return _read_lines(Path(run_dir) / EXPERTS_FILE, _experts_fault)


def read_adaptation(run_dir: str | Path) -> list[dict[str, Any]]:
    """The events of a run's `adaptation.jsonl`; empty where there is no file. Raises: DataError as `read_metrics`."""
    return _read_lines(Path(run_dir) / ADAPTATION_FILE, event_fault)


def _read_lines(path: Path, find_fault: Callable[[Mapping[str, Any]], str | None]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    raw_lines = path.read_bytes().splitlines(keepends=True)
    for number, raw in enumerate(raw_lines, start=1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            if number == len(raw_lines) and not raw.endswith(b"\n"):
                break  # the process died while it wrote this line
            raise DataError(f"{path}, line {number}: not JSON ({error}). {_REPAIR_ADVICE}") from error
        fault = "not an object" if not isinstance(line, dict) else _any_fault(line) or find_fault(line)
        if fault is not None:
            raise DataError(f"{path}, line {number}: {fault}. {_REPAIR_ADVICE}")
        lines.append(line)
    return lines


_REPAIR_ADVICE = "Remove or repair that line."


def _any_fault(line: Mapping[str, Any]) -> str | None:
    return None if isinstance(line.get("step"), int) else "no integer `step`"


def _metrics_fault(line: Mapping[str, Any]) -> str | None:
    for name, value in line.items():
        if value is not None and not isinstance(value, int | float):
            return f"{name} is {value!r}, not a number"
    return None if isinstance(line.get("time_s"), int | float) else "no number `time_s`"


def _experts_fault(line: Mapping[str, Any]) -> str | None:
    layers = line.get("layers")
    if not isinstance(layers, dict):
        return "no object `layers`"
    for layer, counts in layers.items():
        has_counts = isinstance(counts, dict)
        missing = [key for key in ("load", "num_tokens", "num_unrouted") if not has_counts or key not in counts]
        if missing:
            return f"layer {layer} lacks {', '.join(missing)}"
    return None


def _encode(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(_without_nonfinite(line), allow_nan=False) + "\n").encode()


def _without_nonfinite(value: Any) -> Any:
    """The same JSON value with null for every NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(entry) for entry in value]
    return value


def _open_for_append(path: Path) -> BinaryIO:
    return open(path, "ab")


def _repair_last_line(path: Path) -> None:
    """Make the file end with a whole line, so that the next line does not run into a half-written one."""
    if not path.exists():
        return
    content = path.read_bytes()
    rest = content[content.rfind(b"\n") + 1 :]
    if not rest:
        return
    try:
        json.loads(rest)
    except ValueError:
        logger.warning("%s ended in a half-written line of %d bytes, which is dropped.", path, len(rest))
        os.truncate(path, len(content) - len(rest))
    else:
        with open(path, "ab") as file:
            file.write(b"\n")


def _git_state(package_dir: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout that the package runs from and whether it has changes; (None, None) if it is not one.

    A package installed below some other repository (a virtual environment inside a project) is not that repository.
    """
    top = _git(package_dir, "rev-parse", "--show-toplevel")
    commit = _git(package_dir, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != package_dir.parent:
        return None, None
    changes = _git(package_dir, "status", "--porcelain")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
