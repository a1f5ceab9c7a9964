"""What a run has written line by line, for tests that wait for a step or compare two runs that should be the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynmoe_ds.telemetry import is_of_the_machine

FILES = ("metrics", "experts", "adaptation")


def run_lines(run_dir: str | Path, name: str) -> list[dict[str, Any]]:
    """The lines of one of a run's FILES, without what clocks and memory said."""
    lines = (Path(run_dir) / f"{name}.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not is_of_the_machine(key)} for line in lines]


def what_was_written(run_dir: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The same of all of them."""
    return {name: run_lines(run_dir, name) for name in FILES}


def last_step(run_dir: Path) -> int:
    """The last optimiser step that a run has logged, which may be writing the next; 0 before the first."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0
