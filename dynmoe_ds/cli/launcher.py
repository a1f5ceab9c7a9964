"""The ranks as a child: its command line and environment, and seeing to it that nothing outlives the front end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType

import psutil
import torch

from dynmoe_ds.cli.launcher_watch import CHECKPOINT_GRACE_S, FRONT_PID_VARIABLE
from dynmoe_ds.config.load import RUN_DIR_VARIABLE
from dynmoe_ds.errors import EXIT_PREEMPTED, ConfigError
from dynmoe_ds.launching.variables import EXIT_NOTE_VARIABLE

# A launcher that ends in order ends after its ranks; what they started may take a moment longer.
_LAUNCHER_LEAD_S = 2.0

_SAME_SIGNAL_S = 1.0

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def check_devices(num_ranks: int) -> None:
    """Raises: ConfigError when there are GPUs, but fewer than ranks: NCCL refuses two ranks on one."""
    if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count < num_ranks:
            there = "is 1 GPU" if count == 1 else f"are {count} GPUs"
            raise ConfigError(
                f"parallel.num_ranks is {num_ranks} but there {there} here. Use parallel.num_ranks={count} with a "
                "parallel.ep_size that divides it (parallel=single is one rank), or set DS_ACCELERATOR=cpu in the "
                "environment to train on the CPU."
            )


def launch_command(overrides: Sequence[str], environment: Mapping[str, str], *, num_ranks: int) -> list[str]:
    """The command that starts `num_ranks` ranks of `dynmoe train` under DeepSpeed's launcher on this machine."""
    # A choice of devices in the environment is honoured by the launcher only when no number of them is given.
    devices = [] if environment.get(_VISIBLE) else ["--num_gpus", str(num_ranks)]
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank", *devices,
        "--master_port", str(_free_port()), "--module", "dynmoe_ds", "train", *overrides,
    ]  # fmt: skip


def rank_environment(base: Mapping[str, str], *, num_ranks: int, run_dir: str) -> dict[str, str]:
    """The environment of the ranks: `base`, where what a user has set stays, and what all ranks must share."""
    environment = dict(base)
    environment[RUN_DIR_VARIABLE] = run_dir
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    name_accelerator(environment)
    if environment.get("DS_ACCELERATOR", "cuda") == "cuda" and environment.get(_VISIBLE):
        environment[_VISIBLE] = ",".join(environment[_VISIBLE].split(",")[:num_ranks])
    else:
        # On CPU the launcher would read it as a choice of devices, of which it has one.
        environment.pop(_VISIBLE, None)
    return environment


def name_accelerator(environment: MutableMapping[str, str]) -> None:
    """Say that there is none where that is so: DeepSpeed would warn of it in every process that imports it."""
    if not torch.accelerator.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")


def _free_port() -> int:
    """A port nobody listens on. Another process may take it before rank 0 does; then the run fails and says so."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def supervise(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    grace_s: float = 15.0,
    checkpoint_grace_s: float = CHECKPOINT_GRACE_S,
) -> int:
    """Run a command in a process group of its own until the whole group is gone, and return its exit code.

    SIGUSR1 is passed on to the group, whose ranks write a checkpoint and end with code 85. SIGTERM and a closed
    terminal do the same, with SIGKILL after `checkpoint_grace_s`; the code is 128 + the signal if there was no
    checkpoint. Ctrl-C stops the group without one: SIGINT, `grace_s` later SIGTERM, then SIGKILL; the code is 130. A
    second signal brings SIGKILL at once. A launcher that was killed reports success and leaves its ranks behind: these
    are ended as by SIGTERM, and the code is 85 or 1.
    """
    received: list[int] = []
    handled = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    # A terminal that closes under `nohup` must go on being ignored.
    handled = {number for number in handled if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, _noting(received)) for number in handled}
    try:
        with tempfile.TemporaryDirectory(prefix="dynmoe-") as folder:
            note = Path(folder) / "exit_code"
            own = {FRONT_PID_VARIABLE: f"{os.getpid()}", EXIT_NOTE_VARIABLE: f"{note}"}
            child = subprocess.Popen(
                command,
                env={**environment, **own},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_ignore_signals,
            )
            before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda number, frame: _pass_on(child.pid, number))
            while child.poll() is None and not received:
                time.sleep(0.05)
            if received and received[0] == signal.SIGINT:
                _stop_group(child.pid, received, grace_s)
                child.wait()
                _say("interrupted")
                return 128 + signal.SIGINT
            left_behind = not received and not _wait_for_end(child.pid, received, _LAUNCHER_LEAD_S)
            if received or left_behind:
                _end_with_checkpoint(child.pid, received, checkpoint_grace_s)
            child.wait()
            noted = note.read_text() if note.exists() else ""
            return _exit_code(child.returncode, noted, received, left_behind=left_behind)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _noting(received: list[int]) -> Callable[[int, FrameType | None], None]:
    """A handler that appends a signal to `received`, and one that comes twice in a moment only once.

    `timeout` and Slurm may send SIGTERM to a process and to a group that it is in.
    """
    last_s = -_SAME_SIGNAL_S

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal last_s
        is_again = bool(received) and number == received[-1] and number != signal.SIGINT
        if not is_again or time.monotonic() - last_s > _SAME_SIGNAL_S:
            last_s = time.monotonic()
            received.append(number)

    return note


def _ignore_signals() -> None:
    """In the child, before it starts: the front process of the launcher would answer SIGINT with a traceback.

    The launcher's second process sets a handler of its own and stops the ranks; until it has, SIGTERM is what works.
    SIGUSR1 would end both processes of the launcher and leave the ranks behind; the ranks have a handler of their own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _pass_on(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _end_with_checkpoint(group: int, received: list[int], grace_s: float) -> None:
    """Ask the ranks of a process group for a checkpoint and an end; SIGKILL after `grace_s` or at a further signal.

    Asked with SIGUSR1: SIGTERM would end DeepSpeed's front process, and its second one stops rank after rank. Asked
    every second: a rank that is still starting ignores it.
    """
    num_received, end = len(received), time.monotonic() + grace_s
    while time.monotonic() < end and len(received) == num_received:
        _pass_on(group, signal.SIGUSR1)
        if _wait_for_end(group, received, min(1.0, grace_s)):
            return
    _pass_on(group, signal.SIGKILL)
    _wait_for_end(group, received, grace_s)


def _stop_group(group: int, received: list[int], grace_s: float) -> None:
    """Stop a process group with SIGINT, then SIGTERM, then SIGKILL; a further signal skips to that."""
    num_received = len(received)
    for step in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if len(received) > num_received and step != signal.SIGKILL:
            continue
        try:
            os.killpg(group, step)
        except ProcessLookupError:
            return
        if _wait_for_end(group, received, grace_s):
            return


def _wait_for_end(group: int, received: list[int], grace_s: float) -> bool:
    """Whether the group is gone within `grace_s`; a further signal from the user ends the waiting."""
    seen, end = len(received), time.monotonic() + grace_s
    while _is_alive(group):
        if time.monotonic() > end or len(received) > seen:
            return False
        time.sleep(0.1)
    return True


def _is_alive(group: int) -> bool:
    """Whether a process of the group still runs. One that has ended and waits to be reaped does not."""
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return False


def _exit_code(code: int, noted: str, received: Sequence[int], *, left_behind: bool) -> int:
    """The exit code to pass on, with a message where the launcher's own says too little.

    noted: what a rank that left in order has left, or nothing. A launcher that is stopped itself returns another code.
    """
    if left_behind:
        _say("dynmoe: the launcher ended before its ranks, which were stopped.")
    if noted == f"{EXIT_PREEMPTED}":
        return EXIT_PREEMPTED
    if code == 0 and noted == "0":
        return 0
    if received:
        name = signal.Signals(received[0]).name
        _say(
            f"dynmoe: ended by {name}. No checkpoint was written; the same command goes on from the one before, if "
            "there is one and checkpoint.resume is auto."
        )
        return 128 + received[0]
    if left_behind:
        return code if code > 0 else 1
    if code < 0:
        _say(f"dynmoe: the launcher was ended by {signal.Signals(-code).name}.")
        return 1
    if code == 0:
        _say("dynmoe: the launcher reports success, but no rank does.")
        return 1
    killed_by = 256 - code
    if killed_by in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        hint = " Memory may have run out." if killed_by == signal.SIGKILL else ""
        _say(f"dynmoe: a rank was ended by {signal.Signals(killed_by).name}.{hint}")
    return code


def _say(text: str) -> None:
    """On a terminal that may have been closed."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
