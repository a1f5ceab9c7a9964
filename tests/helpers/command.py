"""`dynmoe` as a user types it, in processes of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def dynmoe(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dynmoe_ds", *arguments]


def environment() -> dict[str, str]:
    """For a process that is no rank of anything, and finds the programs that were installed beside Python."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_")) and k not in _OF_RANKS}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    return own | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}


class Started:
    """A command in the background, with what it says in a file.

    seen: every process below it that was there when somebody looked. Those whose parent has died are below it no more.
    """

    def __init__(self, command: Sequence[str], output: Path, **variables: str) -> None:
        self.output = output
        self.seen: set[psutil.Process] = set()
        with output.open("w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment() | variables, stdout=file, stderr=file)

    def look(self) -> set[psutil.Process]:
        """The processes below it now."""
        try:
            found = set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return set()
        self.seen |= found
        return found

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 120.0, every_s: float = 0.1) -> None:
        """Raises: AssertionError with what was said, where the command ends before or takes too long."""
        end = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < end and self.process.poll() is None, self.output.read_text()
            self.look()
            time.sleep(every_s)
        self.look()

    def kill(self) -> None:
        """Leave nothing of it, whatever has become of its first process."""
        self.look()
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
