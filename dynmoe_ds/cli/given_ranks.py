"""Ranks that Slurm or Open MPI has started, by the variables that they set."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

_PORT_BASE, _NUM_PORTS = 20000, 10000


def adopt_rank(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where this process is a rank and they are not set.

    What is set already stays: launchers below srun, such as torchrun, have numbered the ranks themselves.
    """
    if "RANK" in environment:
        return
    for name, value in (_of_slurm(environment) or _of_open_mpi(environment) or {}).items():
        environment.setdefault(name, value)


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str] | None:
    """A task of a step by `srun` with several tasks.

    SLURM_PROCID and SLURM_NTASKS alone say nothing: batch scripts, and interactive shells of an allocation, have them,
    too. Steps have a number, and those of a terminal (`srun --pty`) a port for it.
    """
    given = environment.get
    num_tasks = given("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment or int(num_tasks) == 1:
        return None
    if "SLURM_PTY_PORT" in environment:
        return None
    is_one_node = given("SLURM_STEP_NUM_NODES", "1") == "1"
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": given("SLURM_LOCALID", "0"),
        "MASTER_ADDR": "127.0.0.1" if is_one_node else first_host(given("SLURM_STEP_NODELIST", "")),
        # Of the job, which is another one for each run of an array.
        "MASTER_PORT": f"{_PORT_BASE + int(given('SLURM_JOB_ID', '0')) % _NUM_PORTS}",
    }


def _of_open_mpi(environment: Mapping[str, str]) -> dict[str, str] | None:
    """A process of mpirun, which sets these for nothing else. It does not say where rank 0 is, unless all are here."""
    given = environment.get
    size = given("OMPI_COMM_WORLD_SIZE", "1")
    if "OMPI_COMM_WORLD_RANK" not in environment or size == "1":
        return None
    here = {"MASTER_ADDR": "127.0.0.1"} if given("OMPI_COMM_WORLD_LOCAL_SIZE") == size else {}
    return here | {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": given("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        "MASTER_PORT": f"{_PORT_BASE}",
    }


def first_host(node_list: str) -> str:
    """The first of Slurm's list of nodes: `n3` of `n[3-5,9],m1`."""
    match = re.match(r"(?P<prefix>[^,\[]*)(\[(?P<number>\d+)[^\]]*\](?P<suffix>[^,\[]*))?", node_list)
    assert match is not None, node_list
    return f"{match['prefix']}{match['number'] or ''}{match['suffix'] or ''}"
