"""The table of what came of a sweep's runs."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import pytest

from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.telemetry.comparison import MAX_RUNS_SHOWN, write_sweep_page
from dynmoe_ds.telemetry.history import read_history
from dynmoe_ds.telemetry.run_folder import METRICS_FILE, SWEEP_FILE, RunFolder
from dynmoe_ds.telemetry.sweep import is_sweep, read_sweep, remarks, summary_table, write_summary
from tests.telemetry.fake_sweep import write_fake_sweep
from tests.telemetry.test_report import Page


def test_a_run_of_each_state_has_its_line(tmp_path: Path) -> None:
    folder = write_fake_sweep(tmp_path / "rates")
    assert is_sweep(folder) and not is_sweep(folder / "0")
    sweep = read_sweep(folder)
    head, rows = summary_table(sweep)
    assert head == [
        "run", "optim.lr", "seed", "state", "steps", "held-out loss", "best held-out loss (at step)", "training loss",
        "mean k", "live experts by layer", "time",
    ]  # fmt: skip
    assert [row[:5] for row in rows] == [
        ["0", "0.001", "0", "finished", "20 of 20"],
        ["1", "0.001", "1", "failed", "10 of 20"],
        ["2", "0.0003", "0", "running", "15 of 20"],
        ["3", "0.0003", "1", "stopped", "5 of 20"],
        ["4", "0.0001", "0", "not started", "0 of 20"],
        ["5", "0.0001", "1", "silent", "10 of 20"],
    ]
    assert rows[4][5:] == ["–"] * 6

    def loss(step: int) -> str:  # of fake_run
        return f"{3.2 + 5 * math.exp(-step / 80):.4f}"

    assert rows[0][5:7] == [loss(20), f"{loss(20)} (20)"]
    assert rows[2][5:7] == ["9.5000", f"{loss(15)} (15)"], "the best is not the last"
    live = [layer.live.values[-1] for layer in read_history(folder / "1").layers]
    assert rows[1][9] == ", ".join(f"{count:.0f}" for count in live) and rows[1][10] == "2 s"
    told = list(remarks(sweep))
    assert told[:2] == [
        f"Lowest held-out loss: {loss(20)}, run 0 (optim.lr=0.001 seed=0).",
        "Run 1: Failed at step 10 of 20. The loss is NaN after step 10.",
    ]
    assert told[2].startswith("Run 3: Stopped at step 5 of 20.") and told[3].startswith("Run 5: Silent:")


def test_the_files_say_what_the_table_says(tmp_path: Path) -> None:
    folder = write_fake_sweep(tmp_path / "rates")
    sweep = read_sweep(folder)
    text = write_summary(sweep)
    assert (folder / "sweep.md").read_text() == text and f"{folder}: run N is in its folder N." in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, rows = summary_table(sweep)
    assert [cells[0], *cells[2:]] == [head, *rows] and len(set(map(len, lines))) == 1
    numbers = list(csv.DictReader(io.StringIO((folder / "sweep.csv").read_text())))
    assert [(one["run"], one["optim.lr"], one["state"]) for one in numbers] == [
        (row[0], row[1], row[3]) for row in rows
    ]
    assert float(numbers[2]["eval/loss"]) == 9.5 and float(numbers[2]["eval/loss_best"]) < 8
    assert (numbers[2]["eval/loss_best_step"], numbers[2]["time_s"]) == ("15", "3.2")
    assert numbers[1]["folder"] == f"{folder}/1" and float(numbers[0]["moe/mean_k"]) > 1
    assert {key for key, value in numbers[4].items() if value == ""} == {
        "eval/loss", "eval/loss_best", "eval/loss_best_step", "train/loss", "moe/mean_k", "live_experts", "time_s",
    }  # fmt: skip


def test_scores_that_are_better_when_higher(tmp_path: Path) -> None:
    (tmp_path / SWEEP_FILE).write_text("run\trouter|x\n0\ta|b\n1\tc\n")
    for number, values in (("0", (0.25, 0.75, 0.5)), ("1", (math.nan, math.nan, math.nan))):
        folder = RunFolder(tmp_path / number)
        for step, value in enumerate(values, 1):
            folder.append_metrics(step, {"eval/accuracy": value}, time_s=step)
    sweep = read_sweep(tmp_path)
    head, rows = summary_table(sweep)
    told = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(one["accuracy"], one["best accuracy (at step)"]) for one in told] == [
        ("0.5000", "0.7500 (2)"),
        ("nan", "–"),
    ]
    assert "held-out loss" not in head and list(remarks(sweep)) == []
    assert "| a\\|b " in write_summary(sweep)


def test_the_page_shows_the_best_runs(tmp_path: Path) -> None:
    num_runs = MAX_RUNS_SHOWN + 2
    lines = "".join(f"{number}\t{number}\n" for number in range(num_runs))
    (tmp_path / SWEEP_FILE).write_text(f"run\tseed\n{lines}")
    assert Page(write_sweep_page(read_sweep(tmp_path), tmp_path / "early.html").read_text()).tags.count("img") == 0
    for number in range(num_runs):
        values = {"eval/loss": 5.0 + number % 7} if number != 3 else {"train/loss": 1.0}
        RunFolder(tmp_path / f"{number}").append_metrics(1, values, time_s=1.0)
    drawn = write_sweep_page(read_sweep(tmp_path), tmp_path / "report.html").read_text()
    page = Page(drawn)
    assert (
        f"{num_runs} runs: {num_runs} running." in page.words
        and f"The {MAX_RUNS_SHOWN} with the lowest held-out loss" in page.words
    )
    assert page.tags.count("img") == 1, "training loss is only of one that is not among the best"
    assert len(re.findall("<tr>", drawn)) == num_runs + 1


@pytest.mark.parametrize("text", ["", "number\tseed\n0\t1\n", "run\tseed\n0\n", "run\tseed\nfirst\t1\n"])
def test_a_table_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / SWEEP_FILE).write_text(text)
    with pytest.raises(DataError, match=r"sweep\.tsv cannot be read: .*The same `dynmoe launch` writes it anew"):
        read_sweep(tmp_path)


def test_faults_of_runs_and_folders(tmp_path: Path) -> None:
    folder = write_fake_sweep(tmp_path / "rates")
    (folder / "sweep.md").mkdir()
    with pytest.raises(ConfigError, match=r"sweep\.md cannot be written: Is a directory"):
        write_summary(read_sweep(folder))
    (folder / "1" / METRICS_FILE).write_text("<oh>\n")
    with pytest.raises(DataError, match=r"1/metrics\.jsonl, line 1: not JSON"):
        read_sweep(folder)
