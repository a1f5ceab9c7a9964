"""Seeing to it, on a rank, that it does not outlive whoever started it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

logger = logging.getLogger(__name__)

FRONT_PID_VARIABLE = "DYNMOE_FRONT_PID"
"""Set by `dynmoe train` for its ranks: its own process."""

CHECKPOINT_GRACE_S = 25.0
"""How long ranks that were asked to stop may take for it. Slurm and Kubernetes send SIGKILL 30 s after SIGTERM, and the
front end needs some of that to end what has not ended by itself."""

_EVERY_S = 1.0

_MODULES = frozenset(
    {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run", "torch.distributed.launch"}
)
_SCRIPTS = frozenset({"deepspeed", "torchrun"})


def find_launchers(environment: Mapping[str, str]) -> list[psutil.Process] | None:
    """The processes above this one that started it, nearest first; None if the front end has gone.

    They are the front end, DeepSpeed's two, and torchrun's, by either of its other names, too.

    Others are not looked at: a shell that has started ranks by hand may end before they do.
    """
    front = environment.get(FRONT_PID_VARIABLE)
    found: list[psutil.Process] = []
    process = psutil.Process().parent()
    while process is not None and (f"{process.pid}" == front or _is_launcher(process)):
        found.append(process)
        process = process.parent()
    return None if front is not None and all(f"{one.pid}" != front for one in found) else found


def watch(
    launchers: Sequence[psutil.Process], ask_to_stop: Callable[[], None], grace_s: float = CHECKPOINT_GRACE_S
) -> None:
    """Call `ask_to_stop` as soon as one of the launchers has gone, and end this process by SIGKILL `grace_s` later.

    In a thread of its own, every second: a signal at the parent's death (PR_SET_PDEATHSIG) would know the nearest one
    only, and DeepSpeed's processes, which are between, do not pass a death on.
    """
    if launchers:
        arguments = (tuple(launchers), ask_to_stop, grace_s)
        threading.Thread(target=_watch, args=arguments, name="launcher watch", daemon=True).start()


def _watch(launchers: Sequence[psutil.Process], ask_to_stop: Callable[[], None], grace_s: float) -> None:
    while all(map(_is_running, launchers)):
        time.sleep(_EVERY_S)
    ask_to_stop()
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_launcher(process: psutil.Process) -> bool:
    """Whether its command line begins as that of a launcher, as a script or as `python -m MODULE`."""
    try:
        words = process.cmdline()[:5]
    except psutil.Error:
        return False
    return any(word in _MODULES or word.rpartition("/")[2] in _SCRIPTS for word in words)


def _is_running(process: psutil.Process) -> bool:
    """Also right for another process that has got the same number, and for one that nobody has reaped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
