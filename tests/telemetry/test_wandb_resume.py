"""A run that is started twice is one run at Weights & Biases, for which a stand-in for its server answers here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.telemetry.wandb_server import WandbServer, wandb_server

_TWO_STARTS = """
import logging, sys, time
from dynmoe_ds.telemetry import Metric
from dynmoe_ds.telemetry.trackers import WandbTracker
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
for mode in ("online", "offline"):
    for first in (1, 4):
        tracker = WandbTracker(f"{sys.argv[1]}/{mode}", {"seed": 1}, "project", mode)
        for step in range(first, first + 3):
            tracker.log(step, [Metric(name="train/loss", value=10.0 - step, reduction="mean")])
        tracker.close()
        time.sleep(1)  # parts offline are named by the second
"""


def run_with(server: WandbServer, home: Path, *command: str, cwd: Path | None = None) -> None:
    """Run a command that knows no other server and no key but its own; it may warn of nothing."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own |= {"HOME": f"{home}", "NETRC": f"{home}/none", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
    done = subprocess.run(
        [sys.executable, *command], env=own, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert "WARNING" not in done.stderr, done.stderr


def test_the_second_part_of_a_run_goes_on_behind_the_first(tmp_path: Path) -> None:
    runs = tmp_path / "rates"
    for mode in ("online", "offline"):
        (runs / mode).mkdir(parents=True)
    (runs / "sweep.tsv").write_text("run\tseed\nonline\t1\noffline\t1\n")
    with wandb_server() as server:
        run_with(server, tmp_path, "-c", _TWO_STARTS, f"{runs}")
        online, offline = ((runs / mode / "wandb" / "run_id").read_text() for mode in ("online", "offline"))
        assert set(server.runs) == {online}
        run_with(server, tmp_path, "-m", "wandb", "sync", f"{runs / 'offline' / 'wandb'}", cwd=tmp_path)
    assert set(server.runs) == {online, offline}
    for run in server.runs.values():
        assert run.groups == {"rates"} and run.is_finished
        lines = [
            (number, line["_step"], line["step"], line["train/loss"]) for number, line in sorted(run.history.items())
        ]
        assert lines == [(number, number, number + 1, 9.0 - number) for number in range(6)]
