"""`dynmoe report`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.telemetry.fake_run import write_fake_run
from tests.telemetry.fake_sweep import write_fake_sweep

from dynmoe_ds.cli.main import main


def test_one_run_and_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_fake_run(tmp_path / "runs" / name, steps=10, eval_every=0, adapt_every=0) for name in ("a", "b")]
    assert main(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out == f"{runs[0] / 'report.html'}\n" and (runs[0] / "report.html").exists()
    assert main(["report", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'runs/report.html'}\n" and (tmp_path / "runs/report.html").exists()
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    assert "2 runs" in (tmp_path / "page.html").read_text()


def test_a_page_of_one_run_has_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_fake_run(tmp_path / "run", steps=10, eval_every=0, adapt_every=0)
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 2
    assert "--out is of a page of several runs. That of one goes into its folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "absent is no run folder and holds none" in capsys.readouterr().err


def test_a_sweep_is_told_in_a_table_and_shown_on_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_fake_sweep(tmp_path / "rates")
    assert main(["report", str(sweep)]) == 0
    said = capsys.readouterr().out
    assert said == f"{(sweep / 'sweep.md').read_text()}\n{sweep / 'report.html'}\n"
    assert "Sweep rates" in (sweep / "report.html").read_text() and "not started" in said
    assert main(["report", str(sweep), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
