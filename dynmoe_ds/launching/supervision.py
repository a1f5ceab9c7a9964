"""Processes here that start ranks elsewhere: waiting for them, stopping them, and what their codes mean."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dynmoe_ds.errors import EXIT_PREEMPTED

STOP_FILE, NOTE_FILE = "stop", "exit_code"
_GRACE_S = 40.0


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


def supervise(commands: Sequence[Command], folder: Path, *, grace_s: float = _GRACE_S) -> int:
    """Start the commands, wait until all have ended, and return an exit code.

    SIGUSR1, SIGTERM and a closed terminal ask the ranks for a checkpoint and an end, through a file of `folder`; the
    code is 85. A second one, and Ctrl-C, end the commands, and so does one that failed `grace_s` ago. Code 0 only if
    the ranks say so, too.
    """
    stop, note = folder / STOP_FILE, folder / NOTE_FILE
    for file in (stop, note):
        file.unlink(missing_ok=True)
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, remember)
    try:
        children = [_start(command) for command in commands]
        _wait(children, received, stop, grace_s)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    noted = note.read_text(encoding="utf-8").strip() if note.exists() else ""
    return _exit_code([child.returncode for child in children], noted, received)


def _start(command: Command) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C comes to this process alone."""
    environment = {**os.environ, **command.environment}
    return subprocess.Popen(command.words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def _wait(children: Sequence[subprocess.Popen[bytes]], received: Sequence[int], stop: Path, grace_s: float) -> None:
    """Until all have ended: by themselves, or because one failed or signals came."""
    failed_s: float | None = None
    while any(child.poll() is None for child in children):
        time.sleep(0.1)
        if received and received[0] != signal.SIGINT and not stop.exists():
            stop.touch()
        if failed_s is None and any(child.returncode for child in children):
            failed_s = time.monotonic()
        is_overdue = failed_s is not None and time.monotonic() - failed_s > grace_s
        if is_overdue or len(received) > 1 or signal.SIGINT in received:
            _end(children, received, grace_s)
            return


def _end(children: Sequence[subprocess.Popen[bytes]], received: Sequence[int], grace_s: float) -> None:
    """SIGTERM, which makes DeepSpeed's launcher and ssh end what they have started; SIGKILL later or at a signal."""
    num_received, end = len(received), time.monotonic() + grace_s
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
