"""A small run, the real components to run it on, and the same run without them to compare with.

`make test-cluster` runs these: as root, with Debian's packages. What is not there is skipped with one sentence; where
neither Slurm nor two hosts are to be had, that is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynmoe_ds.telemetry import is_of_the_machine
from tests.cluster import two_hosts, virtual_slurm

ROOT = Path(__file__).parents[2]
# Experts are born, change ranks and are pruned, and every step is logged.
RUN = (
    "experiment=smoke", "parallel.process_group_timeout_s=120", "training.steps=60", "training.log_every_steps=1",
    "training.eval_every_steps=20", "training.sample_tokens=0", "checkpoint.every_steps=10", "telemetry=disabled",
)  # fmt: skip
# Limits of what takes a minute on a machine that is free: a busy one is no failure, but where a limit itself is tested.
PATIENCE_S = 900


_OF_HOSTS = ("ssh", "sshd", "ssh-keygen")


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    if config.option.markexpr == "cluster":
        no_slurm = virtual_slurm.why_not()
        if no_slurm and (no_hosts := two_hosts.why_not(*_OF_HOSTS)):
            pytest.exit(f"{no_slurm} {no_hosts}", returncode=1)


def environment() -> dict[str, str]:
    """For a process that is no rank of anything."""
    own = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_")) and k not in ("RANK", "WORLD_SIZE")
    }
    return own | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def dynmoe(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dynmoe_ds", *arguments]


def what_was_written(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Every line of a run's files, without what clocks said."""
    lines = {
        name: [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "experts", "adaptation")
    }
    return {
        name: [{k: v for k, v in one.items() if not is_of_the_machine(k)} for one in of] for name, of in lines.items()
    }


def last_step(run_dir: Path) -> int:
    """The last optimiser step that a run has logged."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return int(whole[-1]["step"]) if whole else 0


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run by `dynmoe train`, on this machine and left alone."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = dynmoe("train", *RUN, f"run_dir={folder}")
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def slurm() -> Iterator[virtual_slurm.VirtualSlurm]:
    if reason := virtual_slurm.why_not():
        pytest.skip(reason)
    cluster = virtual_slurm.VirtualSlurm()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def hosts() -> Iterator[two_hosts.TwoHosts]:
    if reason := two_hosts.why_not(*_OF_HOSTS):
        pytest.skip(reason)
    both = two_hosts.TwoHosts()
    try:
        both.start()
        both.start_sshd()
        yield both
    finally:
        both.stop()
