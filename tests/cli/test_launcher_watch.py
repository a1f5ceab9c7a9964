"""Ranks notice that a process above them has gone, ask for a checkpoint, and do not outlive it for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from dynmoe_ds.cli.launcher_watch import find_launchers

RANK = """
import sys, time, psutil
from dynmoe_ds.cli.launcher_watch import watch
watch([psutil.Process(int(sys.argv[1]))], lambda: print("asked", flush=True), grace_s=1.0)
print("watching", flush=True)
time.sleep(120)
"""
SLEEP = [sys.executable, "-c", "import time; time.sleep(120)"]


def test_a_rank_that_does_not_end_by_itself_is_killed() -> None:
    launcher = subprocess.Popen(SLEEP)
    rank = subprocess.Popen([sys.executable, "-c", RANK, f"{launcher.pid}"], stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "watching\n"
        launcher.kill()  # not reaped: a zombie has gone, too
        assert rank.stdout.readline() == "asked\n"
        assert rank.wait(timeout=30) == -signal.SIGKILL
    finally:
        rank.kill()
        launcher.kill()
        launcher.wait()


def test_the_front_end_is_found_and_others_are_not_watched() -> None:
    parent = psutil.Process().parent()
    assert parent is not None
    assert find_launchers({"DYNMOE_FRONT_PID": f"{parent.pid}"}) == [parent]
    assert find_launchers({}) == [], "a shell that has started ranks may end before them"
    assert find_launchers({"DYNMOE_FRONT_PID": f"{os.getpid()}"}) is None, "not above this process: gone"


@pytest.mark.parametrize(
    "name", ["deepspeed.launcher.launch", "/usr/bin/torchrun", "torch.distributed.run", "torch.distributed.launch"]
)
def test_launchers_are_known_by_their_command_line(name: str) -> None:
    script = "from dynmoe_ds.cli.launcher_watch import find_launchers; print([p.pid for p in find_launchers({})])"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"
    command = [sys.executable, "-c", start, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launch:
        assert launch.communicate(timeout=60)[0] == f"[{launch.pid}]\n"
