"""The batch script with stand-ins for Slurm's commands: what it starts, and what it does with signals and codes.

tests/cluster/test_slurm.py has the real ones.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynmoe_ds.errors import LaunchError
from dynmoe_ds.launching.slurm import render, submit
from tests.launching.helpers import launch_of, runs_of

PATIENCE_S = 60
SCONTROL = """
case "$1 $2 $3" in
  "show hostnames "*) printf 'n7\\nn8\\n' ;;
  "-o show node") echo "NodeName=$4 Arch=x NodeAddr=10.0.0.7 NodeHostName=$4" ;;
  requeue*) echo "$@" > requeued; kill $PPID ;;
esac
"""


def programs(folder: Path, **bodies: str) -> Path:
    """A folder for the PATH with a script for each name."""
    for name, body in bodies.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return folder / "bin"


def start(folder: Path, script: str, srun: str, **variables: str) -> subprocess.Popen[str]:
    own = {"PATH": f"{programs(folder, srun=srun, scontrol=SCONTROL)}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456"}
    own |= {"SLURM_JOB_NODELIST": "n[7-8]", **variables}
    return subprocess.Popen(
        ["bash", "-c", script], cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"It does not end. It said: {kill(process)}")
    return process.returncode, said


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Wait until what a script has started has made a file."""
    last_s = time.monotonic() + PATIENCE_S
    while not file.exists():
        if process.poll() is not None or time.monotonic() > last_s:
            pytest.fail(f"There is no {file}. The script said: {kill(process)}")
        time.sleep(0.05)


def kill(process: subprocess.Popen[str]) -> str:
    """Kill a script and all that it has started; what they said."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def test_what_a_rank_is_started_with(tmp_path: Path) -> None:
    values = {"nodes": 2, "gpus_per_node": 0, "environment": ["NOTE=a b"], "cpus_per_rank": 3, "python": "/my/python"}
    script = render(launch_of("slurm", **values), runs_of(run_dir=f"{tmp_path}/a run"))
    srun = 'printf "<%s>" "$@"; echo; env | grep -E "^(MASTER|OMP|NOTE|DS_)" | sort'
    code, said = end(start(tmp_path, script, srun, PYTHONPATH="/mine"))
    words, *variables = said.splitlines()
    run = f"{tmp_path}/a run"
    assert words == (
        '<--kill-on-bad-exit=1><--cpus-per-task=3><bash><-c><trap "" USR1; exec "$@"><rank><env><PYTHONSAFEPATH=1>'
        f"<PYTHONPATH={run}/launch/code:/mine></my/python><-u><-m><dynmoe_ds><train><--config>"
        f"<{run}/launch/config.yaml>"
    )
    assert variables == [
        "DS_ACCELERATOR=cpu", "MASTER_ADDR=10.0.0.7", "MASTER_PORT=23456", "NOTE=a b", "OMP_NUM_THREADS=3",
    ]  # fmt: skip
    assert code == 0


def test_what_pyxis_is_asked_for(tmp_path: Path) -> None:
    values = {"container": "pyxis", "image": "nvcr.io#nvidia/pytorch:26.06-py3", "mounts": ["/my data:/data:ro"]}
    run, here = f"{tmp_path}/a run", os.getcwd()
    _, said = end(start(tmp_path, render(launch_of("slurm", **values), runs_of(run_dir=run)), 'printf "<%s>" "$@"'))
    assert said == (
        "<--kill-on-bad-exit=1><--container-image=nvcr.io#nvidia/pytorch:26.06-py3>"
        f"<--container-mounts={run}:{run},{here}:{here},/my data:/data:ro><--container-workdir={here}>"
        f'<bash><-c><trap "" USR1; exec "$@"><rank><env><PYTHONSAFEPATH=1><PYTHONPATH={run}/launch/code>'
        f"<python3><-u><-m><dynmoe_ds><train><--config><{run}/launch/config.yaml>"
    )


APPTAINER = """
[ "$1 $2 $3 $5" = "exec --nv --bind --pwd" ] || { echo "apptainer was called with $*"; exit 9; }
printf 'binds %s\\nimage %s\\n' "$4" "$7"
cd "$6" && shift 7 && exec "$@"
"""
RANK = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))
print("rank", os.getcwd(), os.environ["PYTHONPATH"], os.environ["NOTE"], *sys.argv[1:], flush=True)
pathlib.Path(os.environ["HERE"]).touch()
time.sleep(60)
"""


def test_what_apptainer_runs_hears_the_signal_and_its_exit_code_comes_back(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    # What it finds in the image is looked for on the same PATH here.
    programs(tmp_path, apptainer=APPTAINER, python3=f'exec {sys.executable} {tmp_path}/rank.py "$@"')
    values = {"container": "apptainer", "image": "a moe.sif", "mounts": ["/my data:/data:ro"], "requeue": False}
    run, there = f"{tmp_path}/a run", tmp_path / "here"
    launch = launch_of("slurm", environment=["NOTE=a b", f"HERE={there}"], gpus_per_node=1, **values)
    srun = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    process = start(tmp_path, render(launch, runs_of(run_dir=run)), srun)
    wait_for(there, process)
    process.send_signal(signal.SIGUSR1)
    code, said = end(process)
    here = os.getcwd()
    assert said.splitlines() == [
        f"binds {run}:{run},{here}:{here},/my data:/data:ro",
        "image a moe.sif",
        f"rank {here} {run}/launch/code a b -u -m dynmoe_ds train --config {run}/launch/config.yaml",
    ]
    assert code == 85


def test_the_runs_of_a_sweep_have_their_own_folders(tmp_path: Path) -> None:
    script = render(launch_of("slurm"), runs_of("seed=1,2", run_dir=f"{tmp_path}/s"))
    _, said = end(start(tmp_path, script, 'echo "${@: -1}"', SLURM_ARRAY_TASK_ID="1"))
    assert said == f"{tmp_path}/s/1/launch/config.yaml\n"


def test_the_only_rank_is_started_as_one(tmp_path: Path) -> None:
    script = render(launch_of("slurm"), runs_of("parallel=single"))
    _, said = end(start(tmp_path, script, 'shift 5; "${@:1:5}" bash -c "echo \\$RANK/\\$WORLD_SIZE \\$LOCAL_RANK"'))
    assert said == "0/1 0\n"


@pytest.mark.parametrize(("code", "requeue", "is_requeued"), [(85, True, True), (85, False, False), (1, True, False)])
def test_only_a_run_with_a_checkpoint_is_requeued(code: int, requeue: bool, is_requeued: bool, tmp_path: Path) -> None:
    script = render(launch_of("slurm", requeue=requeue), runs_of())
    returned, _ = end(start(tmp_path, script, f"exit {code}"))
    assert (tmp_path / "requeued").exists() == is_requeued
    if is_requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 123456\n"
    else:
        assert returned == code


@pytest.mark.parametrize("job", ["123456", "123457"])
def test_a_run_of_a_sweep_is_requeued_without_the_others(job: str, tmp_path: Path) -> None:
    """By its number in the array: that of the job is the whole array's for the last of them, for others it is not."""
    own = {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "1"}
    end(start(tmp_path, render(launch_of("slurm"), runs_of("seed=1,2")), "exit 85", **own))
    assert (tmp_path / "requeued").read_text() == "requeue 123456_1\n"


def test_the_signal_before_the_end_reaches_the_step(tmp_path: Path) -> None:
    """Which takes its time, while bash's `wait` returns early."""
    srun = "trap 'sleep 0.5; exit 85' USR1; touch here; for i in $(seq 300); do sleep 0.1; done"
    process = start(tmp_path, render(launch_of("slurm", requeue=False), runs_of()), srun)
    wait_for(tmp_path / "here", process)
    process.send_signal(signal.SIGUSR1)
    assert end(process)[0] == 85


def test_a_submission_freezes_what_the_job_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = programs(tmp_path, sbatch='echo "$@" > called; cat "$2" > script; echo "77;cluster"', squeue="echo")
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    launch, runs = launch_of("slurm"), runs_of(run_dir=f"{tmp_path}/run")
    assert submit(launch, runs) == "77"
    folder = tmp_path / "run" / "launch"
    assert (tmp_path / "called").read_text() == f"--parsable {folder}/job.sbatch\n"
    assert (tmp_path / "script").read_text() == render(launch, runs), "what --dry-run prints"
    assert (folder / "job_id").read_text() == "77\n"
    # The job's own code, from a folder that has the code, too: as the script starts it.
    (line,) = (line for line in (folder / "job.sbatch").read_text().splitlines() if line.startswith("rank=("))
    words = shlex.split(line.removeprefix("rank=(").partition(" -m ")[0])
    own = [word.replace("${PYTHONPATH:+:$PYTHONPATH}", "") for word in words]
    report = "import dynmoe_ds, dynmoe_kernels, dynmoe_configs as c; print(dynmoe_ds.__path__, dynmoe_kernels.__path__)"
    root = Path(__file__).parents[2]
    done = subprocess.run([*own, "-c", report], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == f"['{folder}/code/dynmoe_ds'] ['{folder}/code/dynmoe_kernels']\n"
    assert (folder / "code" / "dynmoe_configs" / "train.yaml").exists()
    assert own[-2] == sys.executable


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "echo 'sbatch: error: invalid account: moe' >&2; exit 1"
    path = programs(tmp_path, sbatch=refusing, squeue="echo PENDING")
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    launch, runs = launch_of("slurm"), runs_of("seed=0,1", run_dir=f"{tmp_path}/run")
    with pytest.raises(LaunchError, match=r"(?s)refused .*job.sbatch:\nsbatch: error: invalid account: moe\nNothing"):
        submit(launch, runs)
    (tmp_path / "run" / "launch" / "job_id").write_text("5\n")
    with pytest.raises(LaunchError, match=r"Job 5 was launched into .*/run and is PENDING. Wait for it, end it with"):
        submit(launch, runs)
    programs(tmp_path, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", sbatch="echo 6")
    (tmp_path / "run" / "launch" / "job-5_0.log").write_text("what it said")
    assert submit(launch, runs) == "6", "Slurm has forgotten the other one"
    assert (tmp_path / "run" / "launch" / "job_id").read_text() == "6\n"
    assert (tmp_path / "run" / "launch" / "job-5_0.log").exists()
    assert (tmp_path / "run" / "sweep.tsv").read_text() == "run\tseed\n0\t0\n1\t1\n"
    assert [(tmp_path / "run" / n / "launch" / "config.yaml").exists() for n in "01"] == [True, True]
