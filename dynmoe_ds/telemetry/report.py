"""One self-contained web page about a run, made from its folder alone."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from dynmoe_ds.telemetry.events import describe_change, has_change, out_of_slots_advice
from dynmoe_ds.telemetry.history import RunHistory, Series, read_history
from dynmoe_ds.telemetry.page import answers, figure, page, table
from dynmoe_ds.telemetry.pictures import MAX_LAYERS_SHOWN, Picture, draw_pictures
from dynmoe_ds.telemetry.rank_pictures import sent_bytes_per_token
from dynmoe_ds.telemetry.run_folder import ADAPTATION_FILE, CONFIG_FILE, SAMPLE_FILE, VERSIONS_FILE
from dynmoe_ds.telemetry.time_pictures import time_shares
from dynmoe_ds.telemetry.trackers import short_number, spoken_time

REPORT_FILE = "report.html"
PICTURES_FOLDER = "pictures"
MAX_EVENT_ROWS = 1000
UNKNOWN = "not recorded"
COSTS = {
    "moe/active_parameters": "active parameters per token",
    "moe/training_flops_per_token": "training FLOPs per token",
}


def write_report(run_dir: str | Path, *, write_pictures: bool = False) -> Path:
    """Write `report.html` into a run folder from the folder's files, and give its path.

    The page needs nothing else: pictures are inside it. `write_pictures` saves them under `pictures/` as well.

    Raises: DataError where `run_dir` is no run folder or one of its lines is broken.
    """
    path = Path(run_dir)
    history = read_history(path)
    pictures = list(draw_pictures(history))
    if write_pictures:
        folder = path / PICTURES_FOLDER
        folder.mkdir(exist_ok=True)
        for picture in pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
    report = path / REPORT_FILE
    text = page(report_title(path), report_sections(path, history, pictures))
    report.write_text(text, encoding="utf-8")
    return report


def report_title(run_dir: Path) -> str:
    """Of the page about a run."""
    return f"Run {run_dir.resolve().name}"


def report_sections(path: Path, history: RunHistory, pictures: Sequence[Picture] | None = None) -> tuple[str, ...]:
    """What is under the title, some of it empty. pictures: None to draw them."""
    about = (
        '<p class="soft">Training of a mixture-of-experts model: in some of its layers every token chooses which '
        "of several small networks (the experts) to use, and experts are born and pruned while the model trains.</p>"
    )
    settings = _folded("Configuration", path / CONFIG_FILE), _folded("Versions", path / VERSIONS_FILE)
    if not history.series and not history.layers:
        return about, "<p>Nothing has been logged yet: neither a loss nor what experts did.</p>", *settings
    return (
        about,
        _facts(history),
        _layer_table(history),
        _picture_section(history, list(draw_pictures(history)) if pictures is None else pictures),
        answers(path, "Questions and answers"),
        _event_section(history),
        _text_section("Generated sample", path / SAMPLE_FILE, "What the trained model wrote, after the prompt."),
        *settings,
    )


def _facts(history: RunHistory) -> str:
    """The headline numbers."""
    tokens = UNKNOWN
    if history.tokens_seen is not None:
        tokens = ("about " if history.is_tokens_seen_estimated else "") + short_number(history.tokens_seen)
    facts = {
        "optimiser steps": f"{history.last_step}",
        "last training loss": _last(history.series.get("train/loss"), ".3f"),
        "last held-out loss": _last(history.series.get("eval/loss"), ".3f"),
        "training tokens seen": tokens,
        "time": UNKNOWN if history.time_s is None else spoken_time(history.time_s),
        "experts per token (mean k), last": _last(history.series.get("moe/mean_k"), ".2f"),
        "live experts, first → last": _live_range(history),
        "births / deaths": f"{_total(history, 'births')} / {_total(history, 'deaths')}",
    }
    if shares := time_shares(history):
        facts["of a step's time, computing"] = f"{shares['compute']:.0%}"
    if "train/peak_memory_gib" in history.series:
        facts["most memory of a rank"] = f"{max(history.series['train/peak_memory_gib'].values):.2f} GiB"
    for modality in ("image", "text"):
        if series := history.series.get(f"eval/mean_k_per_modality/{modality}"):
            facts[f"experts per {modality} token, held-out, last"] = _last(series, ".2f")
    if (sent := sent_bytes_per_token(history)) is not None:
        facts["bytes between ranks per token, last"] = short_number(sent)
    for name, title in COSTS.items():
        if name in history.series:
            facts[f"{title}, last"] = _last_short(history.series[name])
    cells = [f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts.items()]
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _last_short(series: Series) -> str:
    value = series.values[-1]
    return "not a finite number" if math.isnan(value) else short_number(value)


def _live_range(history: RunHistory) -> str:
    known = [layer.live.values for layer in history.layers if layer.live.values]
    if any(math.isnan(value) for values in known for value in (values[0], values[-1])):
        return UNKNOWN
    if not known:
        return UNKNOWN
    return f"{sum(values[0] for values in known):.0f} → {sum(values[-1] for values in known):.0f}"


def _total(history: RunHistory, kind: str) -> int:
    return sum(count for layer in history.layers for _, count in getattr(layer, kind))


def _last(series: Series | None, form: str) -> str:
    """The last value. One that is no number says so: a diverged loss must not look like a missing one."""
    if series is None or not series.values:
        return UNKNOWN
    value = series.values[-1]
    return "not a finite number" if math.isnan(value) else f"{value:{form}}"


def _layer_table(history: RunHistory) -> str:
    if not history.layers:
        return ""
    rows = []
    for layer in history.layers:
        live = [value for value in layer.live.values if not math.isnan(value)]
        rows.append(
            [
                layer.name,
                f"{live[0]:.0f}" if live else UNKNOWN,
                f"{live[-1]:.0f}" if live else UNKNOWN,
                str(sum(count for _, count in layer.births)),
                str(sum(count for _, count in layer.deaths)),
                _last(layer.mean_k, ".2f"),
                _last(layer.unrouted_share, ".2%"),
                _last(layer.load_entropy, ".2f"),
            ]
        )
    head = ["layer", "experts, first", "experts, last", "births", "deaths"]
    head += ["experts per token (mean k), last", "tokens without an expert, last", "evenness of load (0 to 1), last"]
    return "<h2>Layers</h2>" + table(head, rows, numbers_from=1)


def _picture_section(history: RunHistory, pictures: Sequence[Picture]) -> str:
    if not pictures:
        return "<h2>Pictures</h2><p>Nothing was logged that could be drawn.</p>"
    figures = ["<h2>Pictures</h2>"]
    figures += map(figure, pictures)
    if len(history.layers) > MAX_LAYERS_SHOWN:
        figures.append(
            f'<p class="soft">Pictures are drawn for {MAX_LAYERS_SHOWN} of the {len(history.layers)} layers, evenly '
            f"spread over the depth; the table of layers above has all of them.</p>"
        )
    return "\n".join(figures)


def _event_section(history: RunHistory) -> str:
    rows: list[list[str]] = []
    for event in history.events:
        before = len(rows)
        for layer, change in event["layers"].items():
            told = [describe_change(change)] if has_change(change) else []
            told += [out_of_slots_advice(change)] if change["out_of_slots"] else []
            rows.extend([str(event["step"]), layer, text] for text in told)
        if len(rows) == before:
            rows.append([str(event["step"]), "all", "nothing changed"])
        rows.extend([str(event["step"]), "", f"warning: {warning}"] for warning in event["warnings"])
    if not rows:
        return "<h2>Births and deaths</h2><p>No adaptation took place in this run.</p>"
    note = ""
    rows_shown = table(["step", "layer", "what happened"], rows[:MAX_EVENT_ROWS], numbers_from=None)
    if len(rows) > MAX_EVENT_ROWS:
        note = f" The first {MAX_EVENT_ROWS} of {len(rows)} rows are shown; {ADAPTATION_FILE} has all of them."
    return (
        f'<h2>Births and deaths</h2><p class="soft">Every adaptation of the run, in words.{note}</p>'
        f'<div class="scroll">{rows_shown}</div>'
    )


def _text_section(title: str, path: Path, caption: str) -> str:
    if not path.exists():
        return ""
    text = html.escape(path.read_text(encoding="utf-8", errors="replace"))
    return f'<h2>{html.escape(title)}</h2><p class="soft">{html.escape(caption)}</p><pre>{text}</pre>'


def _folded(title: str, path: Path) -> str:
    if not path.exists():
        return ""
    text = html.escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<details><summary>{html.escape(title)}</summary><pre>{text}</pre></details>"
