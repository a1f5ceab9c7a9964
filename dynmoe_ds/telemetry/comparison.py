"""One self-contained web page that sets several runs side by side, made from their folders alone."""

from __future__ import annotations

import html
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.telemetry.drawing import (
    LAYER_COLOURS,
    STEP_LABEL,
    STYLE,
    Picture,
    calmed,
    finished,
    legend_beside,
    new_figure,
    plot,
    whole_numbers,
)
from dynmoe_ds.telemetry.exact_match_pictures import draw_exact_match_of_runs, exact_match
from dynmoe_ds.telemetry.history import RunHistory, Series, read_history
from dynmoe_ds.telemetry.page import answers, figure, page, table
from dynmoe_ds.telemetry.rank_pictures import sent_bytes_per_token
from dynmoe_ds.telemetry.report import REPORT_FILE, UNKNOWN
from dynmoe_ds.telemetry.run_folder import CONFIG_FILE, METRICS_FILE
from dynmoe_ds.telemetry.sweep import STATE, Sweep, SweptRun, label, remarks, summary_table
from dynmoe_ds.telemetry.time_pictures import time_shares
from dynmoe_ds.telemetry.trackers import short_list, short_number, spoken_time

MAX_RUNS_SHOWN = len(LAYER_COLOURS)
_NOT_A_DIFFERENCE = ("run_dir",)

# Of series over steps: the metric, the title, the axis, a caption.
_CURVES = (
    ("eval/loss", "Held-out loss", "loss", "Loss on data that are never trained on; lower is better."),
    ("train/loss", "Training loss", "loss", "Loss on the training data; lower is better."),
    ("moe/mean_k", "Experts per token", "mean k", "Experts a token uses on average. More cost more computation."),
)


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The run folders among `paths`, and those in folders of runs, such as of stages or a sweep, by name.

    Raises: DataError for a path that is neither.
    """
    runs: dict[Path, Path] = {}
    for path in map(Path, paths):
        inside = runs_in(path)
        if not inside:
            raise DataError(
                f"{path} is no run folder and holds none (seen from {Path.cwd()}): there is no {METRICS_FILE}. Give "
                "the folder that `dynmoe train` wrote (run_dir)."
            )
        for run in inside:
            runs.setdefault(run.resolve(), run)
    return list(runs.values())


def runs_in(path: Path) -> list[Path]:
    """The run folder itself, or the run folders in it, by name."""
    return [path] if _is_run(path) else sorted(filter(_is_run, path.glob("*")))


def _is_run(path: Path) -> bool:
    return (path / METRICS_FILE).exists()


def write_comparison(runs: Sequence[Path], file: str | Path) -> Path:
    """Write a page about `runs`, at most `MAX_RUNS_SHOWN`, in their order, and give its path.

    Raises: ConfigError for too many runs or a path that cannot be written; DataError as `read_history`.
    """
    if len(runs) > MAX_RUNS_SHOWN:
        raise ConfigError(
            f"There are {len(runs)} runs; one page compares {MAX_RUNS_SHOWN}, as more cannot be told apart."
        )
    file = Path(file)
    histories = {name: read_history(path) for name, path in zip(_names(runs), runs, strict=True)}
    return _write(file, f"{len(runs)} runs", _sections(runs, histories, file.parent))


def write_sweep_page(sweep: Sweep, file: str | Path) -> Path:
    """Write a page about a sweep: its table of results, and pictures of its best runs. Gives its path.

    Raises: ConfigError for a path that cannot be written.
    """
    file = Path(file)
    return _write(file, f"Sweep {sweep.folder.resolve().name}", _sweep_sections(sweep, file.parent))


def _write(file: Path, title: str, sections: Iterable[str]) -> Path:
    text = page(title, sections)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror} (seen from {Path.cwd()}).") from error
    return file


def _sweep_sections(sweep: Sweep, folder: Path) -> Iterator[str]:
    head, rows = summary_table(sweep)
    counts = Counter(run.state.word for run in sweep.runs)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    yield f'<p class="soft">{len(sweep.runs)} runs: {told}. Numbers are the last that were logged.</p>'
    yield table(head, rows, numbers_from=head.index(STATE) + 1)
    told = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in remarks(sweep))
    yield f"<ul>{told}</ul>" if told else ""
    begun = [run for run in sweep.runs if run.history is not None]
    yield _links([run.folder for run in begun], [f"run {run.number}" for run in begun], folder)
    shown = sorted(sorted(begun, key=_by_loss)[:MAX_RUNS_SHOWN], key=lambda run: run.number)
    histories = {f"{run.number}: {label(sweep, run)}": run.history for run in shown if run.history is not None}
    if not histories:
        return
    which = f" The {len(shown)} with the lowest held-out loss are shown." if len(shown) < len(begun) else ""
    yield f'<h2>Pictures</h2><p class="soft">Every line of a picture is a run.{which}</p>'
    shares = {name: found for name, one in histories.items() if (found := exact_match(one))}
    yield from map(figure, _draw(histories, shares))


def _by_loss(run: SweptRun) -> tuple[float, int]:
    """The order in which runs are chosen: by the last held-out loss, those without one at the end."""
    series = run.history.series.get("eval/loss") if run.history is not None else None
    loss = series.values[-1] if series is not None else math.inf
    return (loss if math.isfinite(loss) else math.inf), run.number


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of their paths before as tells them apart."""
    parts = [path.resolve().parts for path in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _sections(runs: Sequence[Path], histories: Mapping[str, RunHistory], folder: Path) -> Iterator[str]:
    about = "Runs side by side; every line of a picture is a run. Numbers are the last that were logged."
    yield f'<p class="soft">{about}</p>'
    yield table(["run", *_FACTS], [[name, *_facts(one)] for name, one in histories.items()], numbers_from=1)
    yield _links(runs, list(histories), folder)
    yield "<h2>Settings that differ</h2>" + _differences(runs, list(histories))
    shares = {name: found for name, one in histories.items() if (found := exact_match(one))}
    if shares:
        yield "<h2>Held-out questions answered</h2>" + _share_table(shares)
    yield "<h2>Pictures</h2>"
    yield from map(figure, _draw(histories, shares))
    for name, path in zip(histories, runs, strict=True):
        yield answers(path, f"{name}: questions and answers")


_FACTS: dict[str, Callable[[RunHistory], str]] = {
    "steps": lambda one: f"{one.last_step}",
    "held-out loss": lambda one: _last(one, "eval/loss", ".4f"),
    "training loss": lambda one: _last(one, "train/loss", ".4f"),
    "mean k": lambda one: _last(one, "moe/mean_k", ".2f"),
    "live experts by layer": lambda one: _live_by_layer(one),
    "active parameters": lambda one: _last_short(one, "moe/active_parameters"),
    "tokens/s (median)": lambda one: _median_rate(one),
    "of a step computing": lambda one: f"{shares['compute']:.0%}" if (shares := time_shares(one)) else "–",
    "bytes/token between ranks": lambda one: "–" if (sent := sent_bytes_per_token(one)) is None else short_number(sent),
    "most memory (GiB)": lambda one: _highest(one, "train/peak_memory_gib"),
    "time": lambda one: UNKNOWN if one.time_s is None else spoken_time(one.time_s),
}


def _facts(history: RunHistory) -> list[str]:
    return [of(history) for of in _FACTS.values()]


def _last(history: RunHistory, name: str, form: str) -> str:
    series = history.series.get(name)
    return f"{series.values[-1]:{form}}" if series is not None else "–"


def _last_short(history: RunHistory, name: str) -> str:
    series = history.series.get(name)
    return short_number(series.values[-1]) if series is not None and math.isfinite(series.values[-1]) else "–"


def _highest(history: RunHistory, name: str) -> str:
    series = history.series.get(name)
    return f"{max(series.values):.2f}" if series is not None else "–"


def _live_by_layer(history: RunHistory) -> str:
    return short_list(history.last_live_experts(), "layers") or "–"


def _median_rate(history: RunHistory) -> str:
    series = history.series.get("train/tokens_per_second")
    known = [value for value in series.values if math.isfinite(value)] if series is not None else []
    return short_number(statistics.median(known)) if known else "–"


def _links(runs: Sequence[Path], names: Sequence[str], folder: Path) -> str:
    """To the runs' own reports, where they have one."""
    reports = {name: path / REPORT_FILE for name, path in zip(names, runs, strict=True)}
    links = [
        f'<a href="{html.escape(os.path.relpath(file, folder))}">{html.escape(name)}</a>'
        for name, file in reports.items()
        if file.exists()
    ]
    return f'<p class="soft">Their own reports: {", ".join(links)}.</p>' if links else ""


def _differences(runs: Sequence[Path], names: Sequence[str]) -> str:
    """A table of every setting that is not the same in all runs."""
    settings = [_flat(_settings(path)) for path in runs]
    keys = dict.fromkeys(key for one in settings for key in one if key not in _NOT_A_DIFFERENCE)
    rows = [[key, *(_told(one, key) for one in settings)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return table(["setting", *names], rows, numbers_from=None) if rows else "<p>There are none.</p>"


def _settings(path: Path) -> Any:
    """Raises: DataError for a file that is no configuration."""
    file = path / CONFIG_FILE
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.name": ...}` of `{"model": {"name": ...}}`."""
    if not isinstance(settings, Mapping) or not settings:
        return {prefix: settings} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _told(settings: Mapping[str, Any], key: str) -> str:
    """The value; a dash for one that is null, or that other kinds of a section have."""
    value = settings.get(key)
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _share_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    kinds = list(dict.fromkeys(kind for of_run in shares.values() for kind in of_run))
    rows = [
        [run, *(f"{of_run[kind]:.1%}" if kind in of_run else "–" for kind in kinds)] for run, of_run in shares.items()
    ]
    return table(["answered exactly", *kinds], rows, numbers_from=1)


def _draw(histories: Mapping[str, RunHistory], shares: Mapping[str, Mapping[str, float]]) -> Iterator[Picture]:
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield from draw_exact_match_of_runs(shares)
        for name, title, axis, caption in _CURVES:
            series = {run: one.series[name] for run, one in histories.items() if name in one.series}
            if series:
                yield _curves(name.replace("/", "_"), title, axis, caption, series, list(histories))
        live = {run: total for run, one in histories.items() if (total := _live_total(one)).steps}
        if live:
            caption = "Live experts of all layers together."
            yield _curves("live_experts", "Live experts", "live experts", caption, live, list(histories), "steps-post")


def _curves(
    name: str,
    title: str,
    axis: str,
    caption: str,
    series: Mapping[str, Series],
    runs: Sequence[str],
    drawstyle: str = "default",
) -> Picture:
    """One line per run, each in the colour that it has in all pictures."""
    drawn, axes = new_figure(3.6)
    for run, values in series.items():
        style = {"color": LAYER_COLOURS[runs.index(run)], "linewidth": 1.6, "drawstyle": drawstyle}
        plot(axes, calmed(values), label=run, **style)
    axes.set_xlabel(STEP_LABEL)
    axes.set_xlim(left=0)
    whole_numbers(axes.xaxis)
    axes.set_ylabel(axis)
    legend_beside(axes)
    return finished(name, title, caption, drawn, axes)


def _live_total(history: RunHistory) -> Series:
    """Live experts summed over layers, at every step at which that of a layer is known."""
    known = [layer.live for layer in history.layers if layer.live.steps]
    steps = sorted({step for live in known for step in live.steps})
    return Series(steps=steps, values=[sum(_at(live, step) for live in known) for step in steps])


def _at(series: Series, step: int) -> float:
    """The value last known at `step`; the first one before it."""
    until = [value for at, value in zip(series.steps, series.values, strict=True) if at <= step]
    return until[-1] if until else series.values[0]
