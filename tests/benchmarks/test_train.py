"""Training speed of the demo model: that all of it runs, and that what is left out or set is what it says."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import train
from benchmarks.side_by_side import run_ranks

ROOT = Path(__file__).parents[2]
NAMES = [
    "dense", "DeepSpeed MoE, dropping", "DeepSpeed MoE, no dropping", "ours: top_k", "ours: top_any_recommended",
    "ours: top_any_budget",
]  # fmt: skip


@pytest.mark.timeout(600)
def test_every_candidate_trains_and_every_cost_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.train", "--quick", "--output", f"{tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads((tmp_path / "train.json").read_text())["runs"]
    assert run["ranks"] == 1 and run["tokens_per_step"] == 2 * 32
    assert list(run["candidates"]) == NAMES
    for name, row in run["candidates"].items():
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"]["least"]), name
        assert row["peak_bytes"] > row["held_bytes"] > 0, name
        assert (row["mean_k"] is not None) == name.startswith("ours"), name
    assert run["candidates"]["ours: top_k"]["mean_k"] == 2
    assert list(run["costs"]) == list(train.COSTS)
    assert run["costs"]["records inside"]["seconds"] > 0
    page = (tmp_path / "train.md").read_text()
    assert all(f"| {name} |" in page for name in (*NAMES, *train.COSTS.values()))
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def look_inside() -> dict[str, float]:
    """What the test below expects of one rank."""
    import dynmoe_ds as dm

    setting = train.Setting(argparse.Namespace(quick=True, timeout=60.0))
    candidate = train.Candidate.ours(setting, dm.TopAnyConfig.recommended(), sets_mean_k=True)

    def recorded() -> float:
        return sum(float(record.num_tokens) for record in candidate.engine.take_records().values())

    found = {}
    candidate.step()
    found["mean k"] = candidate.mean_k()
    candidate.step()
    found["tokens"] = recorded()
    with train.without_records(candidate.engine):
        candidate.step()
    found["tokens without records"] = recorded()
    with train.timed_records(candidate.engine) as spent:
        step = candidate.step()
    found["tokens timed"] = recorded()
    found["share of records"] = sum(spent) / step
    found["parts timed"] = len(spent)
    with train.without_records(candidate.engine):
        pass
    candidate.step()
    found["tokens after"] = recorded()
    found["layers"] = len(setting.config.model.moe_layers())
    return found


def test_what_is_set_and_what_is_left_out() -> None:
    (found,) = run_ranks(look_inside, 1, timeout_s=200)
    assert found["mean k"] == pytest.approx(2, rel=0.2)  # thresholds come from another batch of 64 tokens
    tokens = 64 * found["layers"]
    assert (found["tokens"], found["tokens timed"], found["tokens after"]) == (tokens, tokens, tokens)
    assert found["tokens without records"] == 0
    assert 0 < found["share of records"] < 1
    assert found["parts timed"] == 2 * found["layers"] + 2  # made and labelled in each layer; added and kept at the end


def test_a_cost_is_the_median_of_differences_over_the_least_step() -> None:
    pairs = [(10.0, 11.0), (12.0, 15.0), (9.0, 11.0), (20.0, 24.0), (11.0, 11.0)]  # differences 1, 3, 2, 4 and 0
    assert train._cost(pairs) == {"seconds": 2.0, "low": 0.5, "high": 3.5, "step": 9.0}
    assert train._cost([(1.0, 3.0)]) == {"seconds": 2.0, "low": 2.0, "high": 2.0, "step": 1.0}
