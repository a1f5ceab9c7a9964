from __future__ import annotations

import re
from pathlib import Path

import pytest

from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.telemetry.comparison import MAX_RUNS_SHOWN, find_runs, write_comparison
from dynmoe_ds.telemetry.history import read_history
from dynmoe_ds.telemetry.report import write_report
from dynmoe_ds.telemetry.run_folder import ANSWERS_FILE, CONFIG_FILE
from tests.telemetry.fake_run import write_fake_run
from tests.telemetry.test_report import Page

PIXEL = b"\x89PNG\r\n\x1a\n"


def rows(text: str) -> list[list[str]]:
    """The cells of all tables of a page, row by row."""
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]


def two_runs(folder: Path) -> list[Path]:
    dynamic = write_fake_run(folder / "dynamic", steps=120, exact_match={"": 0.625, "which": 0.75, "sum": 0.5})
    dense = write_fake_run(folder / "dense", steps=60, num_layers=0, exact_match={"": 0.25, "which": 0.25})
    (dense / CONFIG_FILE).write_text("seed: 0\nmodel: {hidden_size: 64, note: a < b & c}\nadaptation: null\n")
    (dynamic / CONFIG_FILE).write_text(
        "seed: 0\nmodel: {hidden_size: 128, note: a < b & c}\nadaptation: {rule: paper}\nrouter: {k_max: null}\n"
    )
    return [dynamic, dense]


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    write_report(runs[0])
    file = write_comparison(runs, tmp_path / "report.html")
    text = file.read_text()
    page = Page(text)
    assert page.addresses[0] == "dynamic/report.html" and len(page.addresses) == 6
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses[1:])
    found = rows(text)
    by_name = {row[0]: row[1:] for row in found}
    head = next(row for row in found if row[0] == "run")
    of_dynamic = next(row for row in found if row[0] == "dynamic" and len(row) == len(head))
    told = dict(zip(head, of_dynamic, strict=True))
    history = read_history(runs[0])
    assert told["steps"] == "120"
    assert told["held-out loss"] == f"{history.series['eval/loss'].values[-1]:.4f}"
    assert told["mean k"] == f"{history.series['moe/mean_k'].values[-1]:.2f}"
    assert told["live experts by layer"] == ", ".join(f"{layer.live.values[-1]:.0f}" for layer in history.layers)
    assert by_name["model.hidden_size"] == ["128", "64"]
    assert by_name["adaptation.rule"] == ["paper", "–"]
    assert "seed" not in by_name and "model.note" not in by_name  # the same in both
    assert "router.k_max" not in by_name  # null and absent
    assert ["answered exactly", "all", "sum", "which"] in found
    assert ["dynamic", "62.5%", "50.0%", "75.0%"] in found
    assert ["dense", "25.0%", "–", "25.0%"] in found


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_fake_run(tmp_path / name / "run", steps=10, eval_every=0, adapt_every=0) for name in ("a", "b")]
    text = write_comparison(runs, tmp_path / "report.html").read_text()
    assert {"a/run", "b/run"} <= {row[0] for row in rows(text)}
    assert "<p>There are none.</p>" in text  # settings that differ


def test_answers_that_were_drawn_are_on_the_pages(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    without = Page(write_report(runs[0]).read_text())
    (runs[0] / ANSWERS_FILE).write_bytes(PIXEL)
    one = Page(write_report(runs[0]).read_text())
    assert len(one.addresses) == len(without.addresses) + 1 and "Questions and answers" in one.words
    several = Page(write_comparison(runs, tmp_path / "report.html").read_text())
    assert "dynamic: questions and answers" in several.words and "dense: questions and answers" not in several.words


def test_a_folder_of_runs_stands_for_its_runs(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    (tmp_path / "notes").mkdir()
    assert find_runs([tmp_path]) == sorted(runs)
    assert find_runs([runs[0], tmp_path / "notes/.."]) == [runs[0], tmp_path / "notes/../dense"]  # each once
    with pytest.raises(DataError, match=r"notes is no run folder and holds none .*no metrics\.jsonl.*\(run_dir\)"):
        find_runs([runs[0], tmp_path / "notes"])


def test_faults(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    with pytest.raises(ConfigError, match=f"There are {MAX_RUNS_SHOWN + 1} runs; one page compares {MAX_RUNS_SHOWN}"):
        write_comparison([runs[0]] * (MAX_RUNS_SHOWN + 1), tmp_path / "report.html")
    with pytest.raises(ConfigError, match=r"absent/report.html cannot be written: No such file"):
        write_comparison(runs, tmp_path / "absent/report.html")
    (runs[0] / CONFIG_FILE).write_text("a: [")
    with pytest.raises(DataError, match=r"config.yaml cannot be read"):
        write_comparison(runs, tmp_path / "report.html")
