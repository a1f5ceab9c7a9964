"""The ranks as a child: the command line, the environment, exit codes, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from dynmoe_ds.cli import launcher
from dynmoe_ds.cli.launcher import check_devices, launch_command, rank_environment, supervise
from dynmoe_ds.cli.main import main
from dynmoe_ds.errors import ConfigError

# A stand-in for the launcher: like DeepSpeed's it starts a child ("the ranks") and handles signals only then. The
# child's id is left in a file.
PARENT = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
{parent_setup}
open({pid_file!r}, "w").write(str(child.pid))
{parent_body}
"""
STUBBORN = "import signal, time\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(120)"
OBEDIENT = "import time; time.sleep(120)"
# Like the ranks: a second to begin, in which SIGUSR1 is ignored; then a checkpoint, a note of the code, and the end.
SAVING = """
import os, signal, sys, time
time.sleep(1)
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
while not asked:
    time.sleep(0.05)
time.sleep(1.5)
open(os.environ["DYNMOE_EXIT_NOTE"], "w").write("85")
sys.exit(85)
"""

FRONT = """
import sys
from dynmoe_ds.cli.launcher import supervise
import os
grace_s = float(sys.argv[2])
command = [sys.executable, "-c", open(sys.argv[1]).read()]
sys.exit(supervise(command, os.environ, grace_s=grace_s, checkpoint_grace_s=grace_s))
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


class Stub:
    """A stub launcher with a child, supervised by a front end in a process of its own."""

    def __init__(self, folder: Path, *, child: str, setup: str = "", body: str = "child.wait()", grace_s: float = 1.0):
        self.pid_file = folder / "child.pid"
        script = folder / "stub.py"
        script.write_text(PARENT.format(child=child, pid_file=str(self.pid_file), parent_setup=setup, parent_body=body))
        command = [sys.executable, "-c", FRONT, str(script), str(grace_s)]
        self.front = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_until(lambda: self.pid_file.exists() and self.pid_file.read_text() != "")
        self.child_pid = int(self.pid_file.read_text())
        time.sleep(0.3)  # for a stubborn child to begin to ignore signals

    def end(self) -> tuple[int, str]:
        """The front end's exit code and what it said."""
        _, said = self.front.communicate(timeout=60)
        return self.front.returncode, said


def test_the_command_is_deepspeeds_launcher_with_the_overrides_as_they_are() -> None:
    overrides = ["experiment=demo", "training.sample_prompt='a b'"]
    command = launch_command(overrides, {}, num_ranks=1)
    port = command[command.index("--master_port") + 1]
    assert command == [
        sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank", "--num_gpus", "1",
        "--master_port", port, "--module", "dynmoe_ds", "train", *overrides,
    ]  # fmt: skip
    assert 1024 < int(port) < 65536


def test_the_real_launcher_understands_the_command() -> None:
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(launch_command(["--x", "a=1"], {}, num_ranks=3)[3:])
    assert (parsed.num_gpus, parsed.module, parsed.no_local_rank, parsed.quiet) == (3, True, True, True)
    assert (parsed.user_script, parsed.user_args) == ("dynmoe_ds", ["train", "--x", "a=1"])


def test_environment_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    base = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3"}
    environment = rank_environment(base, num_ranks=3, run_dir="runs/x")
    assert environment == {
        "PATH": "/bin",
        "DYNMOE_RUN_DIR": "runs/x",
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
    }
    assert rank_environment({}, num_ranks=9, run_dir="runs/x")["OMP_NUM_THREADS"] == "1"
    own = {"OMP_NUM_THREADS": "7", "TOKENIZERS_PARALLELISM": "true"}
    kept = rank_environment(own, num_ranks=2, run_dir="runs/x")
    assert (kept["OMP_NUM_THREADS"], kept["TOKENIZERS_PARALLELISM"]) == ("7", "true")


def test_a_choice_of_gpus_in_the_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    environment = rank_environment({"CUDA_VISIBLE_DEVICES": "3,5,6"}, num_ranks=2, run_dir="runs/x")
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert "DS_ACCELERATOR" not in environment
    assert "--num_gpus" not in launch_command([], environment, num_ranks=2), "the launcher would ignore the choice"


def test_fewer_gpus_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_devices(1)
    with pytest.raises(ConfigError, match=r"parallel.num_ranks is 2 but there is 1 GPU here. Use parallel.num_ranks=1"):
        check_devices(2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_devices(2)


def test_train_checks_first_and_then_starts_the_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def fake(command: list[str], environment: dict[str, str]) -> int:
        started.append((command, environment))
        return 7

    for variable in ("DYNMOE_RUN_DIR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(launcher, "supervise", fake)
    monkeypatch.setattr(launcher, "check_devices", lambda _: None)
    assert main(["train", "seed=x"]) == 2
    assert not started, "nothing is started with a faulty configuration"
    assert main(["train", "--local_rank=0", "experiment=smoke"]) == 7
    ((command, environment),) = started
    assert command[-3:] == ["dynmoe_ds", "train", "experiment=smoke"]
    assert command[command.index("--num_gpus") + 1] == "2"
    assert environment["DYNMOE_RUN_DIR"].startswith("runs/smoke-20")
    assert f"starting 2 ranks; run folder {environment['DYNMOE_RUN_DIR']}" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 2, 85])
def test_exit_codes_pass_through(code: int) -> None:
    leave = f"import os; open(os.environ['DYNMOE_EXIT_NOTE'], 'w').write('{code}'); raise SystemExit({code})"
    assert supervise([sys.executable, "-c", leave], os.environ) == code


def test_a_launcher_that_reports_success_alone_is_not_believed(capfd: pytest.CaptureFixture[str]) -> None:
    """DeepSpeed's does when its second process was killed."""
    assert supervise([sys.executable, "-c", ""], os.environ) == 1
    assert "reports success, but no rank does" in capfd.readouterr().err


def test_a_checkpoint_counts_whatever_the_launcher_returns() -> None:
    """DeepSpeed's returns 1 when it was sent SIGTERM itself, after its ranks have left in order."""
    leave = "import os; open(os.environ['DYNMOE_EXIT_NOTE'], 'w').write('85'); raise SystemExit(1)"
    assert supervise([sys.executable, "-c", leave], os.environ) == 85


def test_deaths_by_signal_are_explained(capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], os.environ) == 1
    assert "the launcher was ended by SIGKILL" in capfd.readouterr().err
    # What DeepSpeed's launcher makes of a rank that was killed: -9 modulo 256.
    assert supervise([sys.executable, "-c", "raise SystemExit(247)"], os.environ) == 247
    assert "a rank was ended by SIGKILL. Memory may have run out." in capfd.readouterr().err


def test_ctrl_c_stops_launcher_and_ranks(tmp_path: Path) -> None:
    """The stub sets a handler of its own, as DeepSpeed's launcher does, and stops its child."""
    setup = "signal.signal(signal.SIGINT, lambda *_: (child.terminate(), sys.exit(1)))"
    stub = Stub(tmp_path, child=OBEDIENT, setup=setup, grace_s=30.0)
    start = time.monotonic()
    stub.front.send_signal(signal.SIGINT)
    code, said = stub.end()
    assert (code, said) == (130, "interrupted\n")
    assert not is_running(stub.child_pid)
    assert time.monotonic() - start < 15, "well before SIGTERM would have come"


def test_ctrl_c_leaves_no_orphan_even_if_nothing_listens(tmp_path: Path) -> None:
    ignore = "for s in (2, 15): signal.signal(s, signal.SIG_IGN)"
    stub = Stub(tmp_path, child=STUBBORN, setup=ignore)
    stub.front.send_signal(signal.SIGINT)
    assert stub.end() == (130, "interrupted\n")
    assert not is_running(stub.child_pid)


def test_ctrl_c_brings_no_traceback_of_a_launcher_without_a_handler(tmp_path: Path) -> None:
    """DeepSpeed's front process has none: SIGINT must pass it by, and SIGTERM ends it."""
    stub = Stub(tmp_path, child=OBEDIENT)
    stub.front.send_signal(signal.SIGINT)
    assert stub.end() == (130, "interrupted\n")
    assert not is_running(stub.child_pid)


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    stub = Stub(tmp_path, child=STUBBORN, setup="for s in (2, 15): signal.signal(s, signal.SIG_IGN)", grace_s=40.0)
    start = time.monotonic()
    stub.front.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert is_running(stub.child_pid)
    stub.front.send_signal(signal.SIGINT)
    assert stub.end() == (130, "interrupted\n")
    assert time.monotonic() - start < 30, "before the time of grace is over"
    assert not is_running(stub.child_pid)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_sigterm_and_a_closed_terminal_stop_everything_in_the_end(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    stub = Stub(tmp_path, child=STUBBORN)
    stub.front.send_signal(number)
    ended, said = stub.end()
    assert ended == code
    assert said.startswith(f"dynmoe: ended by {number.name}. No checkpoint was written")
    assert not is_running(stub.child_pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_a_closed_terminal_wait_for_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    """Which is asked for until it is heard, and waits for the ranks although SIGTERM comes twice in a moment."""
    stub = Stub(tmp_path, child=SAVING, body="sys.exit(child.wait())", grace_s=40.0)
    stub.front.send_signal(number)
    time.sleep(0.2)
    stub.front.send_signal(number)
    assert stub.end() == (85, "")
    assert not is_running(stub.child_pid)


def test_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    stub = Stub(tmp_path, child=STUBBORN, grace_s=60.0)
    start = time.monotonic()
    stub.front.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert is_running(stub.child_pid)
    stub.front.send_signal(signal.SIGTERM)
    assert stub.end()[0] == 143
    assert time.monotonic() - start < 45, "before the time of grace is over"
    assert not is_running(stub.child_pid)


def test_ranks_left_behind_by_a_launcher_that_reports_success_are_stopped(tmp_path: Path) -> None:
    stub = Stub(tmp_path, child=STUBBORN, body="time.sleep(1); sys.exit(0)")
    code, said = stub.end()
    assert code == 1 and "the launcher ended before its ranks, which were stopped" in said
    assert not is_running(stub.child_pid)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    supervise([sys.executable, "-c", ""], os.environ)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
