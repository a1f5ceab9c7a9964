"""The pictures of time and of ranks: there where the run has the numbers, and of these numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dynmoe_ds.telemetry import time_pictures
from dynmoe_ds.telemetry.comparison import write_comparison
from dynmoe_ds.telemetry.history import read_history
from dynmoe_ds.telemetry.pictures import draw_pictures
from dynmoe_ds.telemetry.report import write_report
from dynmoe_ds.telemetry.run_folder import RunFolder
from dynmoe_ds.telemetry.time_pictures import PARTS, time_shares
from tests.telemetry.drawn_axes import bands_of, catch_axes, lines_of
from tests.telemetry.fake_run import write_fake_run
from tests.telemetry.test_comparison import rows
from tests.telemetry.test_report import facts

LAYERS = ("layers.0.mlp", "layers.2.mlp")


def times(*seconds: float) -> dict[str, float]:
    return {f"train/{part}_time_s": value for part, value in zip(PARTS, seconds, strict=True)}


def run(path: Path, lines: dict[int, dict[str, float]]) -> Path:
    folder = RunFolder(path)
    for step, line in lines.items():
        folder.append_metrics(step, line, time_s=step)
    folder.close()
    return path


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_time_and_imbalance_are_drawn_and_told(tmp_path: Path) -> None:
    ranks = {"moe/rank_imbalance": 1.2} | {f"moe/rank_imbalance/{layer}": 1.3 for layer in LAYERS}
    live = {f"moe/live_experts/{layer}": 4.0 for layer in LAYERS}
    lines = {
        10: times(0.5, 0.3, 0.2, 0.0) | ranks | live | {"train/peak_memory_gib": 2.5},
        40: times(0.8, 0.1, 0.0, 0.1) | ranks | live | {"train/peak_memory_gib": 2.25},
    }
    path = run(tmp_path / "a", lines)
    history = read_history(path)
    # 10 steps of a second and 30 of a second: the later line counts three times as much.
    assert time_shares(history) == pytest.approx(
        {"compute": (5 + 24) / 40, "communication": (3 + 3) / 40, "wait": 2 / 40, "data": 3 / 40}
    )
    drawn = {picture.name: picture for picture in draw_pictures(history)}
    assert list(drawn)[-3:] == ["step_time", "memory", "rank_imbalance"]
    told = facts(write_report(path).read_text())
    assert told["of a step's time, computing"] == "72%"  # of 72.5
    assert told["most memory of a rank"] == "2.50 GiB"
    page = write_comparison([path, write_fake_run(tmp_path / "older", steps=20)], tmp_path / "both.html").read_text()
    found = rows(page)
    columns = [found[0].index(name) for name in ("of a step computing", "most memory (GiB)")]
    assert [[row[column] for column in columns] for row in found[1:3]] == [["72%", "2.50"], ["–", "–"]]
    lines[40] |= times(0.1, 0.8, 0.0, 0.1)
    other = {picture.name: picture for picture in draw_pictures(read_history(run(tmp_path / "b", lines)))}
    assert other["step_time"].png != drawn["step_time"].png
    assert other["rank_imbalance"].png == drawn["rank_imbalance"].png
    assert other["memory"].png == drawn["memory"].png


def test_the_parts_of_a_step_are_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run(tmp_path / "run", {20: times(0.5, 0.25, 0.25, 0.0), 40: times(0.75, 0.125, 0.0, 0.125)})
    caught = catch_axes(monkeypatch, time_pictures)
    assert [picture.name for picture in draw_pictures(read_history(path))] == ["step_time"]
    bands = bands_of(caught["step_time"])  # of milliseconds; the first line holds from the start
    assert list(bands) == ["compute (62%)", "communication (19%)", "wait (12%)", "data (6%)"]  # of 62.5, 18.75, ...
    assert list(bands.values()) == [
        [(0, 0, 500), (20, 0, 500), (40, 0, 750)],
        [(0, 500, 750), (20, 500, 750), (40, 750, 875)],
        [(0, 750, 1000), (20, 750, 1000), (40, 875, 875)],
        [(0, 1000, 1000), (20, 1000, 1000), (40, 875, 1000)],
    ]
    assert caught["step_time"].get_xlim() == (0, 40) and caught["step_time"].get_ylim()[0] == 0


def test_memory_is_drawn_over_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run(
        tmp_path / "run", {step: {"train/peak_memory_gib": gib} for step, gib in ((10, 2.5), (20, 3.25), (40, 2.0))}
    )
    caught = catch_axes(monkeypatch, time_pictures)
    assert [picture.name for picture in draw_pictures(read_history(path))] == ["memory"]
    (points,) = lines_of(caught["memory"]).values()
    assert points == [(10, 2.5), (20, 3.25), (40, 2.0)]
    assert caught["memory"].get_ylim()[0] == 0


@pytest.mark.parametrize("missing", ["all", "one", "no time"])
def test_without_the_parts_there_is_no_picture_of_them(missing: str, tmp_path: Path) -> None:
    parts = {"all": {}, "one": times(0.5, 0.3, 0.2, 0.0), "no time": times(math.nan, 0.0, 0.0, 0.0)}[missing]
    parts.pop("train/data_time_s" if missing == "one" else "", None)
    history = read_history(run(tmp_path / "run", {5: {"train/loss": 1.0} | parts}))
    assert time_shares(history) == {}
    assert [picture.name for picture in draw_pictures(history)] == ["loss"]
