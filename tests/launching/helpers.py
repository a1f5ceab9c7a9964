"""Overrides of a run that is never started, and launch configurations of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from dynmoe_ds.launching.load import load_launch
from dynmoe_ds.launching.runs import Runs, load_runs

SMOKE = ("experiment=smoke", "telemetry=disabled")


@cache  # Hydra takes a second for each
def runs_of(*overrides: str, run_dir: str = "/nowhere/runs/first", check_files: bool = True) -> Runs:
    return load_runs([*SMOKE, *overrides, f"run_dir={run_dir}"], check_files=check_files)


def launch_of(name: str, **values: Any) -> Any:
    launch, faults = load_launch(name, list(values.items()))
    assert not faults, faults
    return launch


def hostfile(folder: Path, text: str = "a slots=1\nb slots=1\n") -> str:
    path = folder / "hostfile"
    path.write_text(text)
    return f"{path}"
