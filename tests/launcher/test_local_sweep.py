"""`dynmoe train -m` as a user types it: one run after the other, and a table of what came of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.command import dynmoe
from tests.launcher.test_demo import lines, run

SHORT = [
    "experiment=smoke", "parallel=single", "training.steps=2", "training.log_every_steps=1", "optim.warmup_steps=0",
    "training.eval_every_steps=2", "training.sample_tokens=0", "adaptation=none", "telemetry=disabled",
]  # fmt: skip


@pytest.mark.launcher
def test_a_run_for_each_seed_and_a_table_of_both(tmp_path: Path) -> None:
    folder = tmp_path / "seeds"
    result = run(dynmoe("train", "-m", *SHORT, "seed=0,1", f"run_dir={folder}"))
    assert result.returncode == 0, result.stderr[-4000:]
    table = (folder / "sweep.md").read_text()
    assert table in result.stdout
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("|")]
    told = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    losses = []
    for number, seed in enumerate((0, 1)):
        own = folder / f"{number}"
        assert json.loads((own / "finished.json").read_text()) == {"steps": 2}
        metrics = lines(own / "metrics.jsonl")
        losses += [line["eval/loss"] for line in metrics if "eval/loss" in line]
        row = told[number]
        assert (row["run"], row["seed"], row["state"], row["steps"]) == (f"{number}", f"{seed}", "finished", "2 of 2")
        assert row["held-out loss"] == f"{losses[-1]:.4f}"
    assert len(losses) == 2 and losses[0] != losses[1]
