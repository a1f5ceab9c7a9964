"""What would make a job fail after it was submitted is said before, with what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.launching.checks import find_launch_faults, find_missing_programs, find_rank_faults, with_global_batch
from tests.launching.helpers import hostfile, launch_of, runs_of


def faults_of(name: str, overrides: tuple[str, ...] = (), run_dir: str = "/nowhere/first", **values: Any) -> list[str]:
    launch = launch_of(name, **values)
    runs = runs_of(*overrides, run_dir=run_dir, check_files=name != "kubernetes")
    return find_rank_faults(launch, runs.num_ranks) + find_launch_faults(launch, runs)


def test_nothing_is_wrong(tmp_path: Path) -> None:
    assert faults_of("local") == []
    assert faults_of("slurm", nodes=2, gpus_per_node=1) == []
    for kind in ("hosts_pdsh", "hosts_openmpi", "hosts_torchrun"):
        assert faults_of(kind, hostfile=hostfile(tmp_path)) == []
    for kind in ("kubernetes", "kubernetes_mpi"):
        assert faults_of(kind, run_dir="/workspace/first", claim="shared", image="a") == []


def test_more_ranks_than_gpus_and_ranks_that_nodes_do_not_share_evenly() -> None:
    (fault,) = faults_of("slurm", ("parallel.num_ranks=16",), nodes=1, gpus_per_node=4)
    assert fault == (
        "parallel.num_ranks is 16, which is 16 per node, but there are only 4 GPUs per node x 1 node = 4. Use "
        "launch.nodes=4, or parallel.num_ranks=4 with a parallel.ep_size that divides it."
    )
    (fault,) = faults_of("slurm", ("parallel.num_ranks=8",), nodes=3, gpus_per_node=4)
    assert fault == (
        "parallel.num_ranks is 8 but must be a multiple of launch.nodes (3), so that every node has as many. Use 6 or "
        "9."
    )
    assert faults_of("slurm", ("parallel.num_ranks=16",), nodes=1, gpus_per_node=0) == [], "without GPUs nobody knows"
    for kind in ("kubernetes", "kubernetes_mpi"):
        pods = {"nodes": 2, "gpus_per_node": 4, "claim": "shared", "image": "a"}
        (fault,) = faults_of(kind, ("parallel.num_ranks=16",), run_dir="/workspace/first", **pods)
        assert fault.startswith("parallel.num_ranks is 16, which is 8 per node, but there are only 4 GPUs per node x 2")


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data", "bert"):
        Path(name).mkdir()
    classifier = (
        "experiment=glue_bert_large", "model.pretrained=bert", "data.path=data", "data.tokenizer=bert",
        "parallel.num_ranks=2", "parallel.ep_size=2",
    )  # fmt: skip
    assert faults_of("slurm", classifier) == []
    missing = [text.replace("=bert", "=brt").replace("=data", "=dta") for text in classifier]
    assert faults_of("slurm", tuple(missing)) == [
        f"{key} is {value!r}, which does not exist here ({tmp_path}). Correct the path."
        for key, value in (("model.pretrained", "brt"), ("data.path", "dta"), ("data.tokenizer", "brt"))
    ]
    container = {"container": "apptainer", "mounts": ["/nope:/nope"]}
    assert faults_of("slurm", image="moe.sif", **container) == [
        f"launch.image is 'moe.sif', which does not exist here ({tmp_path}). Correct the path.",
        f"launch.mounts names '/nope', which does not exist here ({tmp_path}). Correct the path.",
    ]
    assert faults_of("slurm", image="repo/moe:1", container="apptainer") == [
        "launch.image is 'repo/moe:1'. Name a .sif file, or an address such as docker://repo/moe:1."
    ]
    assert faults_of("slurm", image="docker://repo/moe:1", container="apptainer") == []
    assert faults_of("slurm", image="repo#moe:1", container="pyxis") == []


def test_an_interpreter_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for python in (f"{tmp_path}/venv/bin/python", "venv/bin/python"):
        message = (
            f"launch.python is '{python}', which does not exist here ({tmp_path}). Correct the path, or give a name "
            "without '/' for what is on the PATH there."
        )
        assert faults_of("slurm", python=python) == [message]
        for kind in ("hosts_pdsh", "hosts_openmpi", "hosts_torchrun"):
            assert faults_of(kind, python=python, hostfile=hostfile(tmp_path)) == [message]
        container = {"container": "apptainer", "image": "docker://repo/moe:1"}
        assert faults_of("slurm", python=python, **container) == [], "it is in the image"
    for python in (sys.executable, "python3"):
        assert faults_of("slurm", python=python) == []


def test_a_job_that_would_refuse_its_own_folder() -> None:
    (fault,) = faults_of("slurm", ("checkpoint.resume=never",))
    assert fault.startswith("launch.requeue is true but checkpoint.resume is never, so that the job would refuse its")
    assert faults_of("slurm", ("checkpoint.resume=never",), requeue=False) == []


def test_hosts(tmp_path: Path) -> None:
    three = hostfile(tmp_path, "a slots=2\nb slots=1\n")
    assert faults_of("hosts_torchrun", hostfile=three) == [
        f"parallel.num_ranks is 2 but the 2 hosts of {three} have 3 slots together. Use parallel.num_ranks=3, or "
        "change the slots.",
        f"The hosts of {three} have 2, 1 slots, but torchrun needs as many on each. Change the slots, or use "
        "launch=hosts_pdsh.",
    ]
    assert faults_of("hosts_pdsh", ("parallel.num_ranks=3", "parallel.ep_size=1"), hostfile=three) == []
    (fault,) = faults_of("hosts_pdsh", hostfile=f"{tmp_path}/none")
    assert fault.startswith(f"launch.hostfile is '{tmp_path}/none', which cannot be read (No such file or directory;")
    (fault,) = faults_of("hosts_pdsh", ("seed=0,1",), hostfile=hostfile(tmp_path))
    assert fault.startswith("A sweep is launched on hosts, which would run at the same time. Use launch=slurm")


def test_kubernetes(tmp_path: Path) -> None:
    assert faults_of("kubernetes", run_dir="/home/me/My_Run", claim="shared") == [
        "The run folder's name 'My_Run' cannot be a job's in Kubernetes. Set launch.job_name to small letters, digits "
        "and '-'.",
        "run_dir is /home/me/My_Run, which is not below launch.volume_path (/workspace), so that it would be gone with "
        "the pods. Use run_dir=/workspace/NAME.",
    ]
    (fault,) = faults_of("kubernetes", ("seed=0,1",), run_dir="/workspace/first", claim="shared")
    assert fault.startswith("A sweep is launched on Kubernetes, which gets one job at a time.")
    elsewhere = ("data=text_file", "data.path=/workspace/book.txt")
    assert faults_of("kubernetes", elsewhere, run_dir="/workspace/first", claim="a") == [], "pods see it, we do not"
    (tmp_path / "book.txt").write_text("")
    here = ("data=text_file", f"data.path={tmp_path}/book.txt")
    assert faults_of("kubernetes", here, run_dir="/workspace/first", claim="a") == [
        f"data.path is '{tmp_path}/book.txt', which is on this machine. Pods see launch.volume_path (/workspace) and "
        "what is in the image: copy it to the volume, and use data.path=/workspace/NAME."
    ]
    (tmp_path / "book.txt").unlink()
    assert faults_of("kubernetes", here, run_dir="/workspace/first", claim="a") == [], "it may be in the image"


def test_indexed_data_on_this_machine_are_not_the_pods_own(tmp_path: Path) -> None:
    (tmp_path / "books.idx").write_text("")
    (tmp_path / "web.bin").write_text("")
    (tmp_path / "tokenizer").mkdir()
    paths = ",".join(f"{tmp_path}/{name}" for name in ("books", "web", "none"))
    indexed = (
        "experiment=top_p_llama", "data=megatron_indexed", f"data.paths=[{paths},/workspace/more]",
        f"data.tokenizer={tmp_path}/tokenizer",
    )  # fmt: skip
    named = [("data.paths", "books"), ("data.paths", "web"), ("data.tokenizer", "tokenizer")]
    assert faults_of("kubernetes", indexed, run_dir="/workspace/first", claim="a") == [
        f"{key} is '{tmp_path}/{name}', which is on this machine. Pods see launch.volume_path (/workspace) and what is "
        f"in the image: copy it to the volume, and use {key}=/workspace/NAME."
        for key, name in named
    ]


def test_runs_at_the_same_time_are_of_a_sweep() -> None:
    (fault,) = faults_of("slurm", max_parallel=2)
    assert fault.startswith("launch.max_parallel is set but there is one run only.")
    assert faults_of("slurm", ("seed=0,1",), max_parallel=2) == []


def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}")
    needed = {
        "slurm": ["sbatch", "scontrol", "squeue"], "kubernetes": ["kubectl"], "hosts_pdsh": ["pdsh", "ssh"],
        "hosts_openmpi": ["mpirun", "ssh"], "hosts_torchrun": ["ssh"], "local": [],
    }  # fmt: skip
    for name, programs in needed.items():
        launch = launch_of(name, **({"claim": "a"} if name == "kubernetes" else {}))
        found = find_missing_programs(launch)
        assert [text.split()[3] for text in found] == programs
        assert all("on the PATH. " in text and "or use --dry-run to see" in text for text in found)
    assert find_missing_programs(launch_of("hosts_torchrun", start="print")) == []
    for program in ("sbatch", "scontrol", "squeue"):
        assert find_missing_programs(launch_of("slurm")) != []
        (tmp_path / program).write_text("")
        (tmp_path / program).chmod(0o755)
    assert find_missing_programs(launch_of("slurm")) == []


def test_the_global_batch_is_reached_by_accumulation() -> None:
    runs = runs_of("training.micro_batch_size=4", "parallel.num_ranks=4")
    (config,) = with_global_batch(runs, 48).configs
    assert config.training.gradient_accumulation_steps == 3
    assert with_global_batch(runs, None) is runs
    with pytest.raises(ConfigError) as caught:
        with_global_batch(runs, 40)
    assert f"{caught.value}" == (
        "launch.global_batch_size is 40 but must be a multiple of the 16 sequences of a micro step (4 ranks of "
        "training.micro_batch_size 4). Use 32 or 48."
    )
    with pytest.raises(ConfigError, match=r"Use 16\."):
        with_global_batch(runs, 8)
