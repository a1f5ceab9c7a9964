"""The files of launch/: what `dynmoe launch --dry-run` prints for these, as it would be on a cluster.

`python -m tests.launching.examples` writes them anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynmoe_ds.launching import hosts, kubernetes, slurm
from dynmoe_ds.launching.runs import Runs
from tests.launching.helpers import launch_of, runs_of

FOLDER = Path(__file__).parents[2] / "launch"
PROJECT = "/home/me/project"

_NODES = ("parallel=two_nodes", "model.num_slots=16")
_PYTHON = "/home/me/project/.venv/bin/python"


def _lines(launch: Any, runs: Runs) -> str:
    return "\n".join(hosts.lines(launch, runs)) + "\n"


def _hosts(name: str) -> Callable[[], str]:
    def text() -> str:
        launch = launch_of(name, hostfile=f"{FOLDER / 'hostfile'}", python=_PYTHON)
        return _lines(launch, runs_of(*_NODES, run_dir="/shared/runs/first")).replace(f"{FOLDER}", "launch")

    return text


def _slurm(run_dir: str, *overrides: str, **values: Any) -> Callable[[], str]:
    def text() -> str:
        launch = launch_of("slurm", nodes=2, partition="gpu", account="moe", **{"python": _PYTHON} | values)
        return slurm.render(launch, runs_of(*_NODES, *overrides, run_dir=run_dir))

    return text


def _kubernetes(name: str) -> Callable[[], str]:
    def text() -> str:
        launch = launch_of(name, nodes=2, claim="shared", image="registry.example/dynmoe:gpu")
        return kubernetes.render(launch, runs_of(*_NODES, run_dir="/workspace/runs/first", check_files=False))

    return text


EXAMPLES: dict[str, Callable[[], str]] = {
    "slurm.sbatch": _slurm("/shared/runs/first"),
    "slurm_sweep.sbatch": _slurm("/shared/runs/rates", "optim.lr=1e-3,3e-4", "seed=0,1", max_parallel=2),
    "slurm_pyxis.sbatch": _slurm(
        "/shared/runs/first", container="pyxis", image="nvcr.io#nvidia/pytorch:26.06-py3", python=None,
        mounts=["/data:/data:ro"], setup=["module load slurm"], cpus_per_rank=12,
    ),
    "slurm_apptainer.sbatch": _slurm(
        "/shared/runs/first", container="apptainer", image="docker://registry.example/dynmoe:gpu", python=None,
        sbatch_options=["--qos=high", "--comment=a run of two nodes"], requeue=False, environment=["NCCL_DEBUG=INFO"],
    ),
    "hosts_pdsh.txt": _hosts("hosts_pdsh"),
    "hosts_openmpi.txt": _hosts("hosts_openmpi"),
    "hosts_torchrun.txt": _hosts("hosts_torchrun"),
    "pytorchjob.yaml": _kubernetes("kubernetes"),
    "mpijob.yaml": _kubernetes("kubernetes_mpi"),
}  # fmt: skip


def in_the_project(text: Callable[[], str]) -> str:
    """What an example is in the folder /home/me/project."""
    real, had = os.getcwd, {name: os.environ.pop(name, None) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.getcwd = lambda: PROJECT
    try:
        return text()
    finally:
        os.getcwd = real
        os.environ.update({name: value for name, value in had.items() if value is not None})


if __name__ == "__main__":
    for _name, _text in EXAMPLES.items():
        (FOLDER / _name).write_text(in_the_project(_text), encoding="utf-8")
