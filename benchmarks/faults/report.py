"""The table of a fault campaign."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- campaign -->", "<!-- end of campaign -->"


def write_report(found: Mapping[str, Any], path: Path) -> None:
    """Write the table between its marks; what stands around it stays."""
    table = "\n".join([BEGIN, *lines(found), END])
    text = path.read_text() if path.exists() else f"# Runs that are killed\n\n{BEGIN}{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(before + table + after)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What a campaign found, as Markdown."""
    kills, runs = found["kills"], found["runs"]
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    num_equal = sum(not run["differences"] for run in runs)
    yield f"`python -m benchmarks.faults --seed {found['seed']}` ({machine}; {found['minutes']} minutes):"
    yield ""
    yield f"- {len(kills)} kills in {len(runs)} runs of {found['steps']} steps with {found['events']} adaptations each;"
    yield f"  {sum(kill['in_save'] for kill in kills)} of them while a checkpoint was being written;"
    yield f"- {num_equal} of {len(runs)} runs ended with the losses, plans and model file of the undisturbed run;"
    yield f"- processes left behind: {sum(kill['left_behind'] for kill in kills)}; the last one was gone"
    yield f"  {max(kill['gone_s'] for kill in kills):.1f} s after the kill at the latest."
    yield ""
    yield _row("run", "signal", "to", "while", "last step logged", "newest checkpoint", "exit code",
               "all gone after, s", "run ended")  # fmt: skip
    yield _row(*["---"] * 9)
    ends = {run["run"]: "; ".join(run["differences"]) or "equal" for run in runs}
    for kill in kills:
        moment = "saving" if kill["in_save"] else "starting" if kill["moment"] == "start" else "training"
        yield _row(kill["run"], kill["signal"], kill["victim"], moment, kill["logged_step"], kill["latest"],
                   kill["code"], kill["gone_s"], ends[kill["run"]])  # fmt: skip


def _row(*entries: object) -> str:
    return "| " + " | ".join(str(entry) for entry in entries) + " |"
