"""Slurm: the batch script of a run or of a sweep's array, and its submission."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dynmoe_ds.errors import EXIT_PREEMPTED, LaunchError
from dynmoe_ds.launching.config import SlurmConfig
from dynmoe_ds.launching.freeze import code_folder, config_file, freeze, launch_folder
from dynmoe_ds.launching.runs import Runs

SCRIPT_FILE = "job.sbatch"
JOB_FILE = "job_id"
_SLURM_TIMEOUT_S = 60
# While scontrol looks for a job that Slurm does not know any more it says so.
_UNKNOWN_JOB = "Invalid job id"


def render(launch: SlurmConfig, runs: Runs) -> str:
    """The batch script, exactly as `submit` hands it to sbatch."""
    return "\n".join(("#!/bin/bash", *_options(launch, runs), "", *_body(launch, runs), ""))


def submit(launch: SlurmConfig, runs: Runs) -> str:
    """Freeze code and configuration, hand the script to sbatch, and return the job's number.

    Raises: LaunchError for a run folder that another job still uses, and with what sbatch says when it refuses.
    """
    own = launch_folder(runs.folder)
    for folder in {own, *(launch_folder(Path(config.run_dir)) for config in runs.configs)}:
        _refuse_if_in_use(folder)
    freeze(launch, runs, {SCRIPT_FILE: render(launch, runs)}, with_code=True)
    script = own / SCRIPT_FILE
    done = _slurm("sbatch", "--parsable", f"{script}")
    if done.returncode:
        raise LaunchError(
            f"sbatch refused {script}:\n{done.stderr.strip()}\nNothing was submitted. Change what it names (launch.KEY="
            "VALUE) and launch again."
        )
    job = done.stdout.strip().partition(";")[0]  # a cluster's name may follow
    (own / JOB_FILE).write_text(f"{job}\n", encoding="utf-8")
    return job


def _options(launch: SlurmConfig, runs: Runs) -> Iterator[str]:
    own = launch_folder(runs.folder)
    options = [
        f"--job-name={runs.folder.name}",
        f"--chdir={os.getcwd()}",
        f"--output={own / ('job-%A_%a.log' if runs.is_sweep else 'job-%j.log')}",
        "--open-mode=append",
        f"--nodes={launch.nodes}",
        f"--ntasks-per-node={runs.num_ranks // launch.nodes}",
        f"--time={launch.time}",
        f"--signal=B:USR1@{launch.signal_s}",
        "--requeue" if launch.requeue else "--no-requeue",
    ]
    for name in ("gpus_per_node", "partition", "account"):
        if value := getattr(launch, name):
            options.append(f"--{name.replace('_', '-')}={value}")
    if launch.cpus_per_rank is not None:
        options.append(f"--cpus-per-task={launch.cpus_per_rank}")
    if runs.is_sweep:
        limit = "" if launch.max_parallel is None else f"%{launch.max_parallel}"
        options.append(f"--array=0-{len(runs.configs) - 1}{limit}")
    for option in (*options, *launch.sbatch_options):
        yield f"#SBATCH {option if ' ' not in option else shlex.quote(option)}"


def _body(launch: SlurmConfig, runs: Runs) -> Iterator[str]:
    if runs.is_sweep:
        yield f"run={shlex.quote(f'{runs.folder}')}/$SLURM_ARRAY_TASK_ID"
    else:
        yield f"run={shlex.quote(f'{runs.folder}')}"
    yield from launch.setup
    yield from (f"export {name}={shlex.quote(value)}" for name, value in _environment(launch))
    yield from (
        "",
        "# Ranks meet on the first node. Its address, since the names of nodes need not be names of hosts.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR=$(scontrol -o show node \"$first\" | sed 's/.*NodeAddr=\\([^ ]*\\).*/\\1/')",
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))",
        "",
        "# One task per rank, which reads SLURM_PROCID: signals and exit codes pass through srun as they are. USR1 is",
        "# ignored until a rank listens to it.",
        f"rank=({_rank_command(launch, runs)})",
        f'srun {" ".join(_srun_options(launch, runs))} bash -c \'trap "" USR1; exec "$@"\' rank "${{rank[@]}}" &',
        "step=$!",
        "# Again and again: a rank that is starting does not hear it.",
        "ask() { while kill -USR1 $step 2>/dev/null; do sleep 1; done; }",
        "trap 'ask &' USR1",
        "",
        "# wait returns early when a signal comes.",
        "wait $step",
        "code=$?",
        "while kill -0 $step 2>/dev/null; do wait $step; code=$?; done",
    )
    if launch.requeue:
        # SLURM_JOB_ID of an array's last task is the number of the whole array, all of which would be requeued.
        job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if runs.is_sweep else "$SLURM_JOB_ID"
        yield from (
            "",
            f"# {EXIT_PREEMPTED}: a checkpoint was written, from which the same script goes on.",
            f"if [ $code = {EXIT_PREEMPTED} ]; then",
            f'  scontrol requeue "{job}"',
            "  sleep 60  # until Slurm has taken this script away",
            "fi",
        )
    yield "exit $code"


def _environment(launch: SlurmConfig) -> Iterator[tuple[str, str]]:
    yield "OMP_NUM_THREADS", f"{launch.cpus_per_rank or 1}"
    yield "TOKENIZERS_PARALLELISM", "false"
    if launch.gpus_per_node == 0:
        yield "DS_ACCELERATOR", "cpu"
    yield from launch.variables().items()


def _srun_options(launch: SlurmConfig, runs: Runs) -> Iterator[str]:
    yield "--kill-on-bad-exit=1"
    if launch.cpus_per_rank is not None:
        yield f"--cpus-per-task={launch.cpus_per_rank}"  # srun does not take it from sbatch since Slurm 22.05
    if launch.container == "pyxis":
        assert launch.image is not None, launch
        yield f"--container-image={shlex.quote(launch.image)}"
        yield f"--container-mounts={shlex.quote(','.join(_mounts(launch, runs)))}"
        yield f"--container-workdir={shlex.quote(os.getcwd())}"


def _rank_command(launch: SlurmConfig, runs: Runs) -> str:
    """What a task runs, as words of the script."""
    inside = ""
    if launch.container == "apptainer":
        assert launch.image is not None, launch
        gpus = "--nv " if launch.gpus_per_node else ""
        binds = shlex.quote(",".join(_mounts(launch, runs)))
        inside = f"apptainer exec {gpus}--bind {binds} --pwd {shlex.quote(os.getcwd())} {shlex.quote(launch.image)} "
    python = launch.python or (sys.executable if launch.container == "none" else "python3")
    # Without PYTHONSAFEPATH the folder of the submission would come before the job's own code.
    path = f'PYTHONPATH={shlex.quote(f"{code_folder(runs)}")}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    # Where there is one task `dynmoe train` would start its ranks itself.
    only = "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 " if runs.num_ranks == 1 else ""
    config = f'"$run"/{config_file("").as_posix()}'
    return f"{inside}env {only}PYTHONSAFEPATH=1 {path} {shlex.quote(python)} -u -m dynmoe_ds train --config {config}"


def _mounts(launch: SlurmConfig, runs: Runs) -> list[str]:
    own = dict.fromkeys((f"{runs.folder}", os.getcwd()))
    return [*(f"{folder}:{folder}" for folder in own), *launch.mounts]


def _refuse_if_in_use(folder: Path) -> None:
    """Raises: LaunchError while Slurm knows the job that was launched into this folder and has not ended it."""
    file = folder / JOB_FILE
    if not file.exists():
        return
    job = file.read_text(encoding="utf-8").strip()
    done = _slurm("squeue", "--noheader", "--format=%T", f"--jobs={job}")
    states = sorted(set(done.stdout.split()))
    if done.returncode == 0 and states:
        raise LaunchError(
            f"Job {job} was launched into {folder.parent} and is {' and '.join(states)}. Wait for it, end it with "
            f"`scancel {job}`, or use another run_dir."
        )


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{command[0]} did not answer within {_SLURM_TIMEOUT_S} s. Is Slurm's controller up?"
        ) from error
