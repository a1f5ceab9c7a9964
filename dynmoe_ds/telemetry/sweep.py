"""The runs of a sweep with what came of them, also while some have not ended, or not begun."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.telemetry.history import RunHistory, Series, read_history
from dynmoe_ds.telemetry.run_folder import METRICS_FILE, SWEEP_FILE
from dynmoe_ds.telemetry.run_state import Progress, RunState, read_progress, read_state
from dynmoe_ds.telemetry.trackers import short_list, spoken_time

SUMMARY_FILE = "sweep.md"
NUMBERS_FILE = "sweep.csv"
STATE = "state"
NONE = "–"  # in the cells of tables

# What runs are judged by, where they log it: the metric, what it is called, which of two values is the better one.
_SCORES: tuple[tuple[str, str, Callable[[Sequence[float]], float]], ...] = (
    ("eval/loss", "held-out loss", min),
    ("eval/accuracy", "accuracy", max),
    ("eval/f1", "F1", max),
    ("eval/matthews", "Matthews", max),
    ("eval/pearson", "Pearson", max),
    ("eval/spearman", "Spearman", max),
    ("eval/exact_match", "exact match", max),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweptRun:
    """One run of a sweep. values: of the swept keys. history: None before its first line."""

    number: int
    values: tuple[str, ...]
    folder: Path
    state: RunState
    progress: Progress
    history: RunHistory | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """keys: those with several values, in the order in which they were given."""

    folder: Path
    keys: tuple[str, ...]
    runs: tuple[SweptRun, ...]


def is_sweep(folder: Path) -> bool:
    """Whether `dynmoe launch`, or `dynmoe train --multirun`, has made this folder for several runs."""
    return (folder / SWEEP_FILE).exists()


def read_sweep(folder: str | Path) -> Sweep:
    """Raises: DataError for a table that is no sweep's, and for a run with a broken line."""
    folder = Path(folder)
    file = folder / SWEEP_FILE
    try:
        head, *rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        if head[0] != "run" or any(len(row) != len(head) for row in rows):
            raise ValueError("its first line must be `run` and the keys, and each further one a run")
        return Sweep(
            folder=folder,
            keys=tuple(head[1:]),
            runs=tuple(_read_run(folder, int(number), tuple(values)) for number, *values in rows),
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}. The same `dynmoe launch` writes it anew.") from error


def _read_run(folder: Path, number: int, values: tuple[str, ...]) -> SweptRun:
    own = folder / f"{number}"
    progress = read_progress(own)
    return SweptRun(
        number=number,
        values=values,
        folder=own,
        state=read_state(own, progress),
        progress=progress,
        history=read_history(own) if (own / METRICS_FILE).exists() and progress.step else None,
    )


def summary_table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people: the values of each run, how far it is, and its results, last and best."""
    scores = [(name, called, best) for name, called, best in _SCORES if _is_logged(sweep, name)]
    head = ["run", *sweep.keys, STATE, "steps"]
    for _, called, _ in scores:
        head += [called, f"best {called} (at step)"]
    head += ["training loss", "mean k", "live experts by layer", "time"]
    rows = []
    for run in sweep.runs:
        planned = f" of {run.progress.planned}" if run.progress.planned is not None else ""
        row = [f"{run.number}", *run.values, run.state.word, f"{run.progress.step}{planned}"]
        for name, _, best in scores:
            found = _best(run, name, best)
            row += [_last(run, name, ".4f"), "" if found is None else f"{found[0]:.4f} ({found[1]})"]
        row += [_last(run, "train/loss", ".4f"), _last(run, "moe/mean_k", ".2f")]
        row.append("" if run.history is None else short_list(run.history.last_live_experts(), "layers"))
        row.append("" if run.history is None or run.history.time_s is None else spoken_time(run.history.time_s))
        rows.append([cell or NONE for cell in row])
    return head, rows


def remarks(sweep: Sweep) -> Iterator[str]:
    """Sentences about what the table does not say: the best run, and why runs ended early."""
    by_loss = [(found[0], run) for run in sweep.runs if (found := _best(run, "eval/loss", min)) is not None]
    if len(by_loss) > 1:
        loss, run = min(by_loss, key=lambda pair: pair[0])
        yield f"Lowest held-out loss: {loss:.4f}, run {run.number} ({label(sweep, run)})."
    for run in sweep.runs:
        if run.state.word in ("failed", "stopped", "silent"):
            yield f"Run {run.number}: {run.state.told}"


def label(sweep: Sweep, run: SweptRun) -> str:
    """Which values a run has: `optim.lr=0.001 seed=1`."""
    return " ".join(f"{key}={value}" for key, value in zip(sweep.keys, run.values, strict=True))


def write_summary(sweep: Sweep) -> str:
    """Write the table as Markdown, and with all digits as CSV, into the sweep's folder; the Markdown.

    Raises: ConfigError for a folder that cannot be written.
    """
    head, rows = summary_table(sweep)
    text = f"{sweep.folder}: run N is in its folder N.\n\n{_markdown(head, rows)}"
    if told := list(remarks(sweep)):
        text += "\n" + "".join(f"- {sentence}\n" for sentence in told)
    try:
        (sweep.folder / SUMMARY_FILE).write_text(text, encoding="utf-8")
        (sweep.folder / NUMBERS_FILE).write_text(_csv(sweep), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}.") from error
    return text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell, so that it can be read as it is, too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def _csv(sweep: Sweep) -> str:
    """A line per run, results by the names of the metrics; empty where there is none."""
    names = [name for name, _, _ in _SCORES if _is_logged(sweep, name)]
    better = {name: best for name, _, best in _SCORES}
    others = ("train/loss", "moe/mean_k")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    bests = [f"{name}_{what}" for name in names for what in ("best", "best_step")]
    head = ["run", *sweep.keys, STATE, "step", "planned_steps", *names, *bests, *others]
    writer.writerow([*head, "live_experts", "time_s", "folder"])
    for run in sweep.runs:
        row: list[Any] = [run.number, *run.values, run.state.word, run.progress.step, run.progress.planned]
        row += [_last(run, name, "") for name in names]
        row += [value for name in names for value in _best(run, name, better[name]) or ("", "")]
        row += [_last(run, name, "") for name in others]
        history = run.history
        row += ["", ""] if history is None else [" ".join(map(str, history.last_live_experts())), history.time_s]
        writer.writerow([*row, run.folder])
    return out.getvalue()


def _is_logged(sweep: Sweep, name: str) -> bool:
    return any(run.history is not None and name in run.history.series for run in sweep.runs)


def _last(run: SweptRun, name: str, form: str) -> str:
    series = _series(run, name)
    return "" if series is None else f"{series.values[-1]:{form}}"


def _best(run: SweptRun, name: str, best: Callable[[Sequence[float]], float]) -> tuple[float, int] | None:
    """The best finite value and its first step."""
    series = _series(run, name)
    finite = [value for value in series.values if math.isfinite(value)] if series is not None else []
    if series is None or not finite:
        return None
    value = best(finite)
    return value, series.steps[series.values.index(value)]


def _series(run: SweptRun, name: str) -> Series | None:
    return None if run.history is None else run.history.series.get(name)
