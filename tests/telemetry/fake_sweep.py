"""A made-up sweep: a run of each state, for the tests of its table and its page."""

from __future__ import annotations

import os
from pathlib import Path

from dynmoe_ds.telemetry.run_folder import CONFIG_FILE, FINISHED_FILE, LINE_FILES, SWEEP_FILE, RunFolder
from dynmoe_ds.telemetry.run_state import note_stop
from tests.telemetry.fake_run import write_fake_run

CONFIG = "training:\n  steps: 20\n"


def write_fake_sweep(folder: Path) -> Path:
    """Six runs: finished, failed after 10 of 20 steps, running, stopped, launched and not started, silent."""
    folder.mkdir(parents=True)
    values = [(rate, seed) for rate in ("0.001", "0.0003", "0.0001") for seed in ("0", "1")]
    lines = ["run\toptim.lr\tseed", *("\t".join((f"{n}", *both)) for n, both in enumerate(values))]
    (folder / SWEEP_FILE).write_text("".join(f"{line}\n" for line in lines))
    for number, steps in ((0, 20), (1, 10), (2, 15), (3, 5), (5, 10)):
        run = write_fake_run(folder / f"{number}", steps=steps, eval_every=5, adapt_every=5, seed=number)
        (run / CONFIG_FILE).write_text(CONFIG)
    (folder / "0" / FINISHED_FILE).write_text('{"steps": 20}')
    note_stop(folder / "1", 2, "The loss is NaN after step 10.")
    note_stop(folder / "3", 85, "Stopped after optimiser step 5, as asked.")
    (folder / "4" / "launch").mkdir(parents=True)
    (folder / "4" / "launch" / CONFIG_FILE).write_text(CONFIG)
    for name in LINE_FILES:
        os.utime(folder / "5" / name, (0, 0))
    RunFolder(folder / "2").append_metrics(15, {"eval/loss": 9.5}, time_s=3.2)  # worse than it was
    return folder
