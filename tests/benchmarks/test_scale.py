"""The benchmark of scale: that its command runs, and what its report says of measurements that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.scale.design import Case, design, sweeps
from benchmarks.scale.measure import BUCKET_ELEMENTS, RanksFailed, measure_pass
from benchmarks.scale.report import predict, write_report
from dynmoe_ds.config.build import build_section
from dynmoe_ds.planning import Cluster, memory_per_rank, shape_of, work_per_rank

ROOT = Path(__file__).parents[2]


def test_the_quick_form_measures_fits_and_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scale", "--quick", "--rounds", "2", "--passes", "1",
               "--output", str(tmp_path), "--cluster", str(tmp_path / "here.yaml")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "scale.json").read_text())
    assert {line["role"] for line in found["cases"]} == {"fit", "held out"}
    for line in found["cases"]:
        assert line["step_s"] == pytest.approx(min(line["all_s"]), abs=1e-5) and len(line["all_s"]) == 2
        assert line["peak_bytes"] > 100_000
        assert line["mean_k"] == int(line["name"].split("k ")[-1][0]) or "top-any" in line["name"]
        assert 0 < line["mean_k"] <= 4
        assert (line["dispatch_bytes"] > 0) == line["name"].startswith("2 ranks, EP 2")
    cluster = build_section(Cluster, yaml.safe_load((tmp_path / "here.yaml").read_text()), "cluster")
    assert cluster.held_out is not None and cluster.held_out.num_layouts == 2
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    # From these measurements again, without measuring.
    (tmp_path / "scale.md").unlink()
    subprocess.run([*command, "--report"], cwd=ROOT, check=True, timeout=120, capture_output=True)
    assert "On 2 held-out layouts" in (tmp_path / "scale.md").read_text()


def _made_up(cases: list[Case], seconds_per_gflop: float, memory_factor: float) -> dict[str, Any]:
    """Measurements of a machine on which a step takes as long as its FLOPs outside experts and nothing else."""
    lines = []
    for case in cases:
        shape = shape_of(case.config(), None)
        work = work_per_rank(shape, case.layout())
        memory = memory_per_rank(shape, case.layout(), commits_on_touch=False, bucket_elements=BUCKET_ELEMENTS)
        lines.append(
            {
                "name": case.name,
                "role": case.role,
                "step_s": max(1, case.num_ranks / 2) * work.dense_flops / 1e9 * seconds_per_gflop,
                "all_s": [],
                "peak_bytes": memory.total / memory_factor,
                "dispatch_bytes": 0.0,
                "mean_k": float(case.k),
            }
        )
    machine = {"processors": 2, "memory_gib": 9, "torch": "2", "deepspeed": "0"}
    return {"cases": lines, "machine": machine, "command": "made up", "minutes": 1, "passes": 1, "rounds": 1}


def test_the_report_of_a_machine_that_is_known(tmp_path: Path) -> None:
    cases = design()
    found = _made_up(cases, seconds_per_gflop=0.02, memory_factor=1.25)
    slow = next(line for line in found["cases"] if line["role"] == "held out")
    slow["step_s"] *= 2
    cluster, predictions = predict(found, cases)
    assert cluster.float32 is not None and cluster.float32.dense == pytest.approx(5e10, rel=1e-6)
    assert cluster.float32.experts is None or cluster.float32.experts > 1e15
    error = cluster.held_out
    assert error is not None and error.num_layouts == sum(case.role == "held out" for case in cases)
    assert (error.median_time_error, error.worst_time_error) == (pytest.approx(0, abs=1e-6), pytest.approx(0.5))
    assert error.worst_memory_error == pytest.approx(0.25)
    assert len(predictions) == len(cases)
    (tmp_path / "scale.md").write_text("Before.\n<!-- measured -->old<!-- end of measured -->\nAfter.\n")
    assert len(list(write_report(found, cases, tmp_path, tmp_path / "c.yaml"))) == 3
    text = (tmp_path / "scale.md").read_text()
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n") and "old" not in text
    assert "| step time | 0.0% | 50.0% | 0.50 | 1.00 |" in text
    again = build_section(Cluster, yaml.safe_load((tmp_path / "c.yaml").read_text()), "cluster")
    assert again.memory_per_rank_gib == 4.0 and again.float32 is not None
    assert again.float32.dense == pytest.approx(5e10, rel=1e-3)


def test_the_design() -> None:
    cases = design()
    assert len({case.name for case in cases}) == len(cases), "results are kept by name"
    assert {case.num_ranks for case in cases if case.role == "fit"} == {1, 2}
    assert all(case.role == "held out" for case in cases if case.num_ranks == 4)
    curves = sweeps(cases)
    assert list(curves) == ["tokens per rank", "experts per layer", "experts per token", "ranks that share experts"]
    assert [x for x, _ in curves["tokens per rank"]] == [256, 1024, 2048, 4096]
    assert [x for x, _ in curves["experts per layer"]] == [4, 8, 32]
    assert [x for x, _ in curves["experts per token"]] == [1, 2, 4, 8]
    assert [x for x, _ in curves["ranks that share experts"]] == [1, 2, 4]


def test_ranks_that_fail_are_named() -> None:
    broken = replace(design()[0], experts=8, k=0)
    with pytest.raises(RanksFailed, match="rank 0 failed"):
        measure_pass([broken], 1, rounds=1, memory=False, timeout_s=120)
    with pytest.raises(RanksFailed, match=r"ranks \[0\] did not finish within 0 s"):
        measure_pass([design()[0]], 1, rounds=1, memory=False, timeout_s=0.0)
