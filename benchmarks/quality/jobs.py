"""A cell as a job of a worker process, which can import this module but not the command itself."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path

from benchmarks.quality.variants import VARIANTS


def result_path(name: str, task: str, seed: int, steps: int, folder: Path) -> Path:
    from benchmarks.quality.cell import Cell

    return folder / f"{Cell(variant=VARIANTS[name], task=task, seed=seed, steps=steps).name}.json"


def run_job(name: str, task: str, seed: int, steps: int, folder: Path) -> str:
    """Run one cell and write its result aside, then under its name; the error as text, empty for none."""
    logging.disable(logging.WARNING)
    from benchmarks.quality.cell import Cell, run_cell

    path = result_path(name, task, seed, steps, folder)
    try:
        result = run_cell(Cell(variant=VARIANTS[name], task=task, seed=seed, steps=steps), folder)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result))
    aside.replace(path)
    return ""
