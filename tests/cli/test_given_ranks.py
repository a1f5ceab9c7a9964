"""Which processes are ranks by the variables of Slurm and Open MPI. Those of Slurm were read from a real one, 22.05."""

from __future__ import annotations

import pytest

from dynmoe_ds.cli.given_ranks import adopt_rank, first_host

JOB = {"SLURM_JOB_ID": "12345", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NODELIST": "n[1-2]"}
TASK = JOB | {
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
}  # fmt: skip


def adopted(given: dict[str, str]) -> dict[str, str]:
    environment = dict(given)
    adopt_rank(environment)
    assert given.items() <= environment.items(), "nothing that was set is changed"
    return {name: value for name, value in environment.items() if name not in given}


def test_a_task_of_a_step() -> None:
    assert adopted(TASK) == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "22345",
    }  # fmt: skip
    one_node = TASK | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_LOCALID": "1"}
    assert adopted(one_node)["MASTER_ADDR"] == "127.0.0.1" and adopted(one_node)["LOCAL_RANK"] == "1"
    told = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"}
    assert adopted(TASK | told) == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("no Slurm", {}),
        ("the batch script, which has a PROCID", JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}),
        ("the shell of salloc", JOB),
        ("a shell by srun --pty", TASK | {"SLURM_PTY_PORT": "42053", "SLURM_PROCID": "0"}),
        ("a step of one task, which starts its ranks itself", TASK | {"SLURM_STEP_NUM_TASKS": "1"}),
        ("a rank of torchrun below srun", TASK | {"RANK": "5", "WORLD_SIZE": "8"}),
        ("mpirun -n 1", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}),
    ],
)
def test_no_rank(what: str, given: dict[str, str]) -> None:
    assert adopted(given) == {}, what


def test_a_process_of_mpirun() -> None:
    given = {
        "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }  # fmt: skip
    assert adopted(given | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1",
    }  # fmt: skip
    here = given | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert (adopted(here)["MASTER_ADDR"], adopted(here)["MASTER_PORT"]) == ("127.0.0.1", "20000")


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("n1", "n1"), ("n[1-2]", "n1"), ("n[3,5-7],m1", "n3"), ("gpu-a[007-010]-ib,b", "gpu-a007-ib"), ("a,b", "a"),
        ("node12,node[14-16]", "node12"),
    ],
)  # fmt: skip
def test_the_first_node(listed: str, first: str) -> None:
    assert first_host(listed) == first
