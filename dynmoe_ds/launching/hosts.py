"""Several hosts that see one file system: DeepSpeed's launcher through pdsh or mpirun, or one torchrun on each."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dynmoe_ds.errors import EXIT_PREEMPTED
from dynmoe_ds.launching.config import DeepSpeedConfig, TorchrunConfig
from dynmoe_ds.launching.freeze import config_file, launch_folder
from dynmoe_ds.launching.hostfile import read_hostfile
from dynmoe_ds.launching.runs import Runs
from dynmoe_ds.launching.variables import EXIT_NOTE_VARIABLE, STOP_FILE_VARIABLE

DEEPSPEED_ENVIRONMENT_FILE = "deepspeed_env"
# Of a connection over which nothing comes any more, so that a host that is cut off is noticed within 15 s.
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2")
_STOP, _NOTE = "stop", "exit_code"
_TERM_GRACE_S = 40.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A process to start here. host: what it is for; `environment` is added to this process's."""

    host: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As a line of shell."""
        own = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join((*own, shlex.join(self.words)))


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
    """Start the commands, wait until all have ended, and return an exit code.

    SIGUSR1, SIGTERM and a closed terminal ask the ranks for a checkpoint and an end, through a file of the run folder;
    the code is 85. A second one, and Ctrl-C, end the commands. Code 0 only if the ranks say so, too.
    """
    folder = launch_folder(runs.folder)
    for name in (_STOP, _NOTE):
        (folder / name).unlink(missing_ok=True)
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        children = [
            # A session of its own: Ctrl-C comes to this process alone.
            subprocess.Popen(
                one.words, env={**os.environ, **one.environment}, stdin=subprocess.DEVNULL, start_new_session=True
            )
            for one in commands(launch, runs)
        ]
        _wait(children, received, folder / _STOP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    noted = (folder / _NOTE).read_text() if (folder / _NOTE).exists() else ""
    return _exit_code([child.returncode for child in children], noted, received)


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
    own = {STOP_FILE_VARIABLE: f"{folder / _STOP}", EXIT_NOTE_VARIABLE: f"{folder / _NOTE}"}
    shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
    if isinstance(launch, DeepSpeedConfig) and launch.runner == "openmpi":
        # mpirun numbers the ranks, but does not say where they meet.
        shared |= {"MASTER_ADDR": _master(launch), "MASTER_PORT": f"{launch.master_port}"}
    given = dict(text.split("=", 1) for text in launch.environment)
    return own | shared | given


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


def _wait(children: Sequence[subprocess.Popen[bytes]], received: Sequence[int], stop: Path) -> None:
    """Until all have ended: by themselves, or because one failed or signals came."""
    failed_s: float | None = None
    while any(child.poll() is None for child in children):
        time.sleep(0.1)
        if received and received[0] != signal.SIGINT and not stop.exists():
            stop.touch()
        if failed_s is None and any(child.returncode for child in children):
            failed_s = time.monotonic()
        is_overdue = failed_s is not None and time.monotonic() - failed_s > _TERM_GRACE_S
        if is_overdue or len(received) > 1 or signal.SIGINT in received:
            _end(children, received)
            return


def _end(children: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> None:
    """SIGTERM, which makes DeepSpeed's launcher and ssh end what they have started; SIGKILL later or at a signal."""
    num_received, end = len(received), time.monotonic() + _TERM_GRACE_S
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
    while any(child.poll() is None for child in children):
        time.sleep(0.1)
        if time.monotonic() > end or len(received) > num_received:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
    for child in children:
        child.wait()


def _exit_code(codes: Sequence[int | None], noted: str, received: Sequence[int]) -> int:
    """Codes of launchers tell little: torchrun turns 85 into 1, and DeepSpeed's a death by a signal into 0."""
    if noted == f"{EXIT_PREEMPTED}":
        return EXIT_PREEMPTED
    if noted == "0" and not any(codes):
        return 0
    if received:
        return 128 + received[0]
    return next((code for code in codes if code is not None and code > 0), 1)


def lines(launch: DeepSpeedConfig | TorchrunConfig, runs: Runs) -> Iterator[str]:
    """The commands to read or to paste."""
    for one in commands(launch, runs):
        yield f"# {one.host}"
        is_for_hands = isinstance(launch, TorchrunConfig) and launch.start == "print"
        yield one.words[-1] if is_for_hands else f"{one}"
