"""A small run, the real components to run it on, and the same run without them to compare with.

`make test-cluster` runs these: as root, with Debian's packages. What is not there is skipped with one sentence; where
neither Slurm nor two hosts are to be had, that is a failure.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import two_hosts, virtual_slurm
from tests.helpers.asked_for import exit_where_asked_for
from tests.helpers.command import ROOT, dynmoe, environment
from tests.helpers.run_lines import last_step, what_was_written

__all__ = ["DEMO", "PATIENCE_S", "ROOT", "RUN", "dynmoe", "environment", "last_step", "what_was_written"]

_COMMON = (
    "parallel.process_group_timeout_s=120", "training.steps=60", "training.log_every_steps=1",
    "training.eval_every_steps=20", "training.sample_tokens=0", "checkpoint.every_steps=10", "telemetry=disabled",
)  # fmt: skip
# Experts are born, change ranks and are pruned, and every step is logged.
RUN = ("experiment=smoke", *_COMMON)
DEMO = (
    "experiment=demo", *_COMMON, "training.eval_sequences=16", "training.micro_batch_size=4", "optim.warmup_steps=10",
    "adaptation.every_steps=10", "adaptation.window_steps=5",
)  # fmt: skip
# Limits of what takes a minute on a machine that is free: a busy one is no failure, but where a limit itself is tested.
PATIENCE_S = 900

_OF_HOSTS = ("ssh", "sshd", "ssh-keygen")


def why_not() -> str | None:
    """What is missing where none of these tests can run; None where a part of them can."""
    no_slurm, no_hosts = virtual_slurm.why_not(), two_hosts.why_not(*_OF_HOSTS)
    return f"{no_slurm} {no_hosts}" if no_slurm and no_hosts else None


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    exit_where_asked_for(config, "cluster", why_not)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of RUN by `dynmoe train`, on this machine and left alone."""
    return left_alone(tmp_path_factory.mktemp("undisturbed") / "run", *RUN)


def left_alone(folder: Path, *overrides: str) -> Path:
    """The run folder of `dynmoe train` on this machine."""
    command = dynmoe("train", *overrides, f"run_dir={folder}")
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def assert_shared_experts(folder: Path) -> None:
    """That two ranks computed for each other."""
    written = what_was_written(folder)
    assert written["metrics"][-1]["moe/sent_row_bytes_per_token"] > 0
    assert {len(layer["rows_per_rank"]) for layer in written["experts"][-1]["layers"].values()} == {2}


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
