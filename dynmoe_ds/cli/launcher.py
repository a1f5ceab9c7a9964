"""The ranks as a child: its command line and environment, and seeing to it that nothing outlives the front end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

import psutil
import torch

from dynmoe_ds.config.load import RUN_DIR_VARIABLE
from dynmoe_ds.errors import ConfigError

_VISIBLE = "CUDA_VISIBLE_DEVICES"

# Said by DeepSpeed 0.19 about its own calls, on every rank, at the first step; nothing a user can act on.
_KNOWN_NOISE = (
    "ignore:`torch.distributed.all_gather_into_tensor` is deprecated:FutureWarning",
    "ignore:`torch.distributed.reduce_scatter_tensor` is deprecated:FutureWarning",
)


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
    warnings = [base["PYTHONWARNINGS"]] if base.get("PYTHONWARNINGS") else []
    environment["PYTHONWARNINGS"] = ",".join([*_KNOWN_NOISE, *warnings])
    if not torch.accelerator.is_available():
        # Without it every process says that it found no accelerator.
        environment.setdefault("DS_ACCELERATOR", "cpu")
    if environment.get("DS_ACCELERATOR", "cuda") == "cuda" and environment.get(_VISIBLE):
        environment[_VISIBLE] = ",".join(environment[_VISIBLE].split(",")[:num_ranks])
    else:
        # On CPU the launcher would read it as a choice of devices, of which it has one.
        environment.pop(_VISIBLE, None)
    return environment


def _free_port() -> int:
    """A port nobody listens on. Another process may take it before rank 0 does; then the run fails and says so."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def supervise(command: Sequence[str], environment: Mapping[str, str], *, grace_s: float = 15.0) -> int:
    """Run a command in a process group of its own until the whole group is gone, and return its exit code.

    Ctrl-C, SIGTERM and a closed terminal stop the group: the same signal, `grace_s` later SIGTERM, then SIGKILL;
    a second Ctrl-C brings SIGKILL at once. The code is then 128 + the signal. SIGUSR1 is passed on to the group. A
    launcher that was killed reports success and leaves its ranks behind: these are stopped, and the code is 1.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # A terminal that closes under `nohup` must go on being ignored.
    handled = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in handled}
    try:
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_ignore_signals,
        )
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda number, frame: _pass_on(child.pid, number))
        while child.poll() is None and not received:
            time.sleep(0.05)
        if received:
            _stop_group(child.pid, received, grace_s)
            child.wait()
            number = received[0]
            print("interrupted" if number == signal.SIGINT else signal.Signals(number).name, file=sys.stderr)
            return 128 + number
        left_behind = not _wait_for_end(child.pid, received, grace_s)
        if left_behind:
            _stop_group(child.pid, [*received, signal.SIGTERM], grace_s)
        return _exit_code(child.returncode, left_behind=left_behind)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _stop_group(group: int, received: list[int], grace_s: float) -> None:
    """Stop a process group with the first signal received, then SIGTERM, then SIGKILL; another one skips to that."""
    num_received = len(received)
    for step in dict.fromkeys((received[0], signal.SIGTERM, signal.SIGKILL)):
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


def _exit_code(code: int, *, left_behind: bool) -> int:
    """The exit code to pass on, with a message where the launcher's own says too little."""
    if left_behind:
        print("dynmoe: the launcher ended before its ranks, which were stopped.", file=sys.stderr)
        return code if code > 0 else 1
    if code < 0:
        print(f"dynmoe: the launcher was ended by {signal.Signals(-code).name}.", file=sys.stderr)
        return 1
    killed_by = 256 - code
    if killed_by in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        hint = " Memory may have run out." if killed_by == signal.SIGKILL else ""
        print(f"dynmoe: a rank was ended by {signal.Signals(killed_by).name}.{hint}", file=sys.stderr)
    return code
