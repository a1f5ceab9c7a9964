"""docs/own_script.md: five changed lines, and both scripts run."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path
from typing import Any

from tests.helpers.spawn import run_ranks

DOCS = Path(__file__).parents[1] / "docs"
BEFORE, AFTER = (DOCS / "examples" / name for name in ("deepspeed_moe.py", "dynmoe.py"))


def changes() -> list[str]:
    before, after = (file.read_text().splitlines() for file in (BEFORE, AFTER))
    lines = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
    return ["@@" if line.startswith("@@") else line for line in lines]


def test_the_page_shows_what_differs_and_it_is_five_lines() -> None:
    shown = (DOCS / "own_script.md").read_text().split("```diff\n")[1].split("```")[0].splitlines()
    assert shown == changes()
    assert len([line for line in shown if line.startswith("+") and line != "+"]) == 5


def run_script(rank: int, world_size: int, file: str) -> tuple[float, list[dict[str, Any]]]:
    from dynmoe_ds.engine import seam

    seam.init_distributed(60.0)  # without the operation that DeepSpeed compiles on CPUs
    left = runpy.run_path(file, run_name="__main__")
    events = getattr(left["engine"], "take_events", list)()
    return left["accuracy"], [event.to_dict() for event in events]


def test_both_learn_and_experts_are_born() -> None:
    before = run_ranks(run_script, 2, f"{BEFORE}", timeout_s=120)
    after = run_ranks(run_script, 2, f"{AFTER}", timeout_s=120)
    for accuracy, _ in (*before, *after):
        assert 0.8 < accuracy < 1, accuracy
    for _, events in after:
        assert sum(len(layer["grown"]) for event in events for layer in event["layers"].values()) > 0
