"""Several hosts that see one file system: DeepSpeed's launcher through pdsh or mpirun, or one torchrun on each."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynmoe_ds.launching.config import DeepSpeedConfig, TorchrunConfig
from dynmoe_ds.launching.freeze import config_file, launch_folder
from dynmoe_ds.launching.hostfile import read_hostfile
from dynmoe_ds.launching.runs import Runs
from dynmoe_ds.launching.supervision import NOTE_FILE, STOP_FILE, Command, supervise
from dynmoe_ds.launching.variables import EXIT_NOTE_VARIABLE, STOP_FILE_VARIABLE

DEEPSPEED_ENVIRONMENT_FILE = "deepspeed_env"
# Of a connection over which nothing comes any more, so that a host that is cut off is noticed within 15 s.
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2")


def commands(launch: DeepSpeedConfig | TorchrunConfig, runs: Runs) -> tuple[Command, ...]:
    """What starts the ranks: one command from here for all hosts, or one for each."""
    if isinstance(launch, DeepSpeedConfig):
        return (_deepspeed(launch, runs),)
    hosts = _hosts(launch)
    if launch.start == "print":
        return tuple(
            Command(host=host, words=("bash", "-c", _torchrun(launch, runs, number)))
            for number, host in enumerate(hosts)
        )
    return tuple(
        Command(host=host, words=_through_ssh(launch, host, _torchrun(launch, runs, number)))
        for number, host in enumerate(hosts)
    )


def _through_ssh(launch: TorchrunConfig, host: str, line: str) -> tuple[str, ...]:
    """A line of shell on another host. The terminal there is closed when the connection ends, which ends torchrun."""
    # Through cat, with the exit code of torchrun, since it is no terminal for people.
    there = shlex.join(("bash", "-o", "pipefail", "-c", f"stty -opost; {line} 2>&1 | cat"))
    return ("ssh", "-tt", *SSH_OPTIONS, *launch.ssh_options, host, there)


def files(launch: DeepSpeedConfig | TorchrunConfig, runs: Runs) -> dict[str, str]:
    """What the commands need in the launch folder beside the configuration, by name."""
    if not isinstance(launch, DeepSpeedConfig):
        return {}
    # DeepSpeed hands only some variables on to other hosts, and those of this file.
    lines = [f"{name}={value}\n" for name, value in _environment(launch, runs).items()]
    return {DEEPSPEED_ENVIRONMENT_FILE: "".join(lines)}


def start(launch: DeepSpeedConfig | TorchrunConfig, runs: Runs) -> int:
    """Start the commands and wait until all have ended; the exit code, as `supervise` has it."""
    return supervise(commands(launch, runs), launch_folder(runs.folder))


def _hosts(launch: DeepSpeedConfig | TorchrunConfig) -> dict[str, int]:
    assert launch.hostfile is not None, launch
    hosts, faults = read_hostfile(Path(launch.hostfile))
    assert not faults, faults
    return hosts


def _master(launch: DeepSpeedConfig | TorchrunConfig) -> str:
    return launch.master_addr or next(iter(_hosts(launch)))


def _environment(launch: DeepSpeedConfig | TorchrunConfig, runs: Runs) -> dict[str, str]:
    """What every rank must know."""
    folder = launch_folder(runs.folder)
    own = {STOP_FILE_VARIABLE: f"{folder / STOP_FILE}", EXIT_NOTE_VARIABLE: f"{folder / NOTE_FILE}"}
    shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
    if isinstance(launch, DeepSpeedConfig) and launch.runner == "openmpi":
        # mpirun numbers the ranks, but does not say where they meet.
        shared |= {"MASTER_ADDR": _master(launch), "MASTER_PORT": f"{launch.master_port}"}
    return own | shared | launch.variables()


def _deepspeed(launch: DeepSpeedConfig, runs: Runs) -> Command:
    assert launch.hostfile is not None, launch
    folder = launch_folder(runs.folder)
    words = [
        launch.python or sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--force_multi",
        # Its own check of ssh does not know the options of ours.
        "--no_ssh_check", "--no_local_rank",
        "--hostfile", os.path.abspath(launch.hostfile), "--launcher", launch.runner,
        "--master_addr", _master(launch), "--master_port", f"{launch.master_port}",
        f"--launcher_args={shlex.join(_runner_options(launch))}",
        "--module", "dynmoe_ds", "train", "--config", f"{config_file(runs.folder)}",
    ]  # fmt: skip
    environment = {"DS_ENV_FILE": f"{folder / DEEPSPEED_ENVIRONMENT_FILE}"}
    if launch.runner == "pdsh":
        environment["PDSH_SSH_ARGS_APPEND"] = shlex.join((*SSH_OPTIONS, *launch.ssh_options))
    return Command(host="all hosts", words=tuple(words), environment=environment)


def _runner_options(launch: DeepSpeedConfig) -> Sequence[str]:
    if launch.runner == "pdsh":
        return launch.runner_options
    return ("--mca", "plm_rsh_args", shlex.join((*SSH_OPTIONS, *launch.ssh_options)), *launch.runner_options)


def _torchrun(launch: TorchrunConfig, runs: Runs, number: int) -> str:
    """The line of shell for one host. With a static meeting point: both ends of a cut-off link end by themselves."""
    hosts = _hosts(launch)
    python = shlex.quote(launch.python or sys.executable)
    environment = _environment(launch, runs)
    if "PYTHONPATH" in os.environ:
        environment = {"PYTHONPATH": os.environ["PYTHONPATH"], **environment}
    own = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    return (
        f"cd {shlex.quote(os.getcwd())} && env {own} {python} -m torch.distributed.run --nnodes {len(hosts)} "
        f"--node-rank {number} --nproc-per-node {next(iter(hosts.values()))} --master-addr {_master(launch)} "
        f"--master-port {launch.master_port} --module dynmoe_ds train "
        f"--config {shlex.quote(f'{config_file(runs.folder)}')}"
    )


def lines(launch: DeepSpeedConfig | TorchrunConfig, runs: Runs) -> Iterator[str]:
    """The commands to read or to paste."""
    for one in commands(launch, runs):
        yield f"# {one.host}"
        is_for_hands = isinstance(launch, TorchrunConfig) and launch.start == "print"
        yield one.words[-1] if is_for_hands else f"{one}"
