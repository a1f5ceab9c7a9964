"""Signals, codes and failures of the processes that start ranks elsewhere, with shells in their place."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynmoe_ds.launching.supervision import Command

FRONT = """
import sys
from pathlib import Path
from dynmoe_ds.launching.supervision import Command, supervise
folder, *lines = sys.argv[1:]
commands = [Command(host="", words=("bash", "-c", line), environment={"RUN": folder}) for line in lines]
sys.exit(supervise(commands, Path(folder), grace_s=1.0))
"""
HERE = "touch $RUN/here-$BASHPID; "
# A minute at most: nothing of an interrupted test goes on.
UNTIL_ASKED = HERE + (
    'for _ in {1..1200}; do [ -e "$RUN/stop" ] && break; sleep 0.05; done; echo 85 > "$RUN/exit_code"; exit 1'
)


def start(folder: Path, *lines: str) -> subprocess.Popen[bytes]:
    """What is left of an earlier start is there, and does not count."""
    (folder / "exit_code").write_text("0")
    (folder / "stop").touch()
    process = subprocess.Popen([sys.executable, "-c", FRONT, f"{folder}", *lines])
    end = time.monotonic() + 60
    while len(list(folder.glob("here-*"))) < sum(HERE in line for line in lines):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    return process


def code_of(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(60)
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_all_ranks_through_the_folder(number: int, tmp_path: Path) -> None:
    process = start(tmp_path, UNTIL_ASKED, UNTIL_ASKED)
    process.send_signal(number)
    assert code_of(process) == 85


def test_a_second_signal_ends_what_does_not_stop(tmp_path: Path) -> None:
    process = start(tmp_path, HERE + "exec sleep 60")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert code_of(process) == 143


def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, HERE + "exec sleep 60", HERE + "trap '' TERM; while sleep 0.1; do :; done")
    process.send_signal(signal.SIGINT)
    assert code_of(process) == 130


def test_what_does_not_end_after_another_has_failed_is_ended(tmp_path: Path) -> None:
    assert code_of(start(tmp_path, "exit 7", "trap '' TERM; while sleep 0.1; do :; done")) == 7


@pytest.mark.parametrize(("note", "code", "returned"), [("0", 0, 0), ("", 0, 1), ("85", 1, 85), ("0", 3, 3)])
def test_codes(note: str, code: int, returned: int, tmp_path: Path) -> None:
    assert code_of(start(tmp_path, f"echo -n '{note}' > $RUN/exit_code; exit {code}")) == returned


def test_a_command_as_a_line_of_shell() -> None:
    command = Command(host="a", words=("ssh", "b c"), environment={"A": "x y"})
    assert f"{command}" == "A='x y' ssh 'b c'"
