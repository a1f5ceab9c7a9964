"""Two jobs never write into one run folder, and one that has died does not keep it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from dynmoe_ds.config import validate
from dynmoe_ds.errors import LaunchError
from dynmoe_ds.telemetry import run_owner
from dynmoe_ds.telemetry.run_owner import OWNER_FILE, RunOwnership, refuse_if_in_use

# A fork knows the shortened times of a test.
_FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT_S": 0.1, "STALE_S": 0.6, "_LOOK_S": 0.05, "_SETTLE_S": 0.3}.items():
        monkeypatch.setattr(run_owner, name, seconds)
    for variable in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[BaseProcess]:
    """Another process, which has the folder `run`."""
    process = in_another_process(hold, tmp_path / "run")
    wait_for(lambda: (tmp_path / "taken").exists())
    yield process
    process.kill()
    process.join()


def hold(run_dir: Path) -> None:
    assert RunOwnership(run_dir).try_take()
    (run_dir.parent / "taken").touch()
    time.sleep(60)


def in_another_process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = _FORK.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def take(ownership: RunOwnership) -> int:
    """Take the folder; how many times that was tried."""
    for number in range(1, 1000):
        if ownership.try_take():
            return number
    raise AssertionError("no end")


def write_owner(run_dir: Path, **values: Any) -> Path:
    """The file of an owner on another machine."""
    own = {
        "host": "n7", "pid_space": "another boot", "pid": 1, "started_s": 1.5, "since": "2026-01-02 03:04:05+00:00",
        "job": None, "restarts": 0,
    }  # fmt: skip
    run_dir.mkdir(exist_ok=True)
    file = run_dir / OWNER_FILE
    file.write_text(json.dumps(own | values))
    return file


def pid_of(run_dir: Path) -> int:
    pid = json.loads((run_dir / OWNER_FILE).read_text())["pid"]
    assert isinstance(pid, int)
    return pid


def test_a_folder_is_taken_and_left(tmp_path: Path) -> None:
    ownership = RunOwnership(tmp_path / "a" / "run")
    assert ownership.try_take() and pid_of(tmp_path / "a" / "run") == os.getpid()
    first = ownership.path.stat().st_mtime_ns
    wait_for(lambda: ownership.path.stat().st_mtime_ns > first)
    ownership.release()
    ownership.release()
    assert not (tmp_path / "a" / "run").exists(), "it was made for nothing"
    (tmp_path / "a" / "run").mkdir()
    again = RunOwnership(tmp_path / "a" / "run")
    assert again.try_take()
    again.release()
    assert list((tmp_path / "a" / "run").iterdir()) == [], "it was there before"
    assert validate.OWNER_FILE == OWNER_FILE


def test_a_second_process_is_refused_at_once(tmp_path: Path, owner: BaseProcess) -> None:
    told = json.loads((tmp_path / "run" / OWNER_FILE).read_text())
    with pytest.raises(LaunchError) as caught:
        RunOwnership(tmp_path / "run").try_take()
    assert f"{caught.value}" == (
        f"run_dir '{tmp_path}/run' is in use by process {owner.pid} on {told['host']} since {told['since']}. Wait for "
        "its end, stop it, or use another run_dir. (That process writes a sign of life into owner.json there.)"
    )
    with pytest.raises(LaunchError, match=f"is in use by process {owner.pid} on "):
        refuse_if_in_use(tmp_path / "run")
    assert pid_of(tmp_path / "run") == owner.pid


def test_a_killed_owner_keeps_nothing(tmp_path: Path, owner: BaseProcess, caplog: pytest.LogCaptureFixture) -> None:
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, as in a container without an init
    refuse_if_in_use(tmp_path / "run")
    ownership = RunOwnership(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        assert ownership.try_take(), "without a wait"
    assert f"run was of process {owner.pid} on " in caplog.text and "which has ended: taking it over" in caplog.text
    assert pid_of(tmp_path / "run") == os.getpid()
    ownership.release()
    assert (tmp_path / "run").exists()


def test_a_number_that_another_process_has_got_since_is_not_the_owner(tmp_path: Path, owner: BaseProcess) -> None:
    file = tmp_path / "run" / OWNER_FILE
    told = json.loads(file.read_text())
    elsewhere = write_owner(tmp_path / "other", **told | {"started_s": told["started_s"] - 100})
    ownership = RunOwnership(elsewhere.parent)
    assert ownership.try_take()
    ownership.release()


def test_an_owner_on_another_machine_that_gives_signs_of_life(tmp_path: Path) -> None:
    file = write_owner(tmp_path / "run")
    ended = threading.Event()
    beating = threading.Thread(target=lambda: [os.utime(file) for _ in iter(lambda: ended.wait(0.1), True)])
    beating.start()
    try:
        ownership = RunOwnership(tmp_path / "run")
        assert not ownership.try_take(), "nothing is known at first"
        with pytest.raises(LaunchError, match="in use by process 1 on n7 since 2026-01-02"):
            take(ownership)
        with pytest.raises(LaunchError, match="in use by process 1 on n7"):
            refuse_if_in_use(tmp_path / "run")
    finally:
        ended.set()
        beating.join()


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_an_owner_on_another_machine_that_gives_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_cut_off: bool
) -> None:
    file = write_owner(tmp_path / "run")
    name = "process 1 on n7 since 2026-01-02 03:04:05+00:00"
    if is_cut_off:
        file.write_text(file.read_text()[:20])
        name = "another process"
    os.utime(file, (2e9, 2e9))  # its clock is years ahead
    refuse_if_in_use(tmp_path / "run")
    ownership = RunOwnership(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        assert take(ownership) == 13, "0.6 s of looks, 0.05 s apart"
    assert "Waiting for up to 0.6 s for a sign of life" in caplog.text
    assert f"There was no sign of life of {name} for 0.6 s: taking the folder over." in caplog.text
    ownership.release()


def test_an_owner_that_ends_while_it_is_watched_was_alive(tmp_path: Path) -> None:
    file = write_owner(tmp_path / "run")
    ownership = RunOwnership(tmp_path / "run")
    assert not ownership.try_take()
    file.unlink()
    with pytest.raises(LaunchError, match="in use by process 1 on n7"):
        ownership.try_take()


def test_a_job_that_is_requeued_does_not_wait_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (job, restarts, is_taken) in enumerate([("77", 1, True), ("77", 0, False), ("78", 1, False)]):
        write_owner(tmp_path / f"{number}", job="77")
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", f"{restarts}")
        ownership = RunOwnership(tmp_path / f"{number}")
        assert ownership.try_take() == is_taken
        ownership.release()
    assert json.loads((tmp_path / "1" / OWNER_FILE).read_text())["host"] == "n7"
    with pytest.raises(LaunchError, match=r"process 1 on n7 \(Slurm job 77\) since"):
        os.utime(tmp_path / "1" / OWNER_FILE)
        watching = RunOwnership(tmp_path / "1")
        assert not watching.try_take()
        os.utime(tmp_path / "1" / OWNER_FILE)
        watching.try_take()


def race(run_dir: Path, start: Any, results: Any) -> None:
    ownership = RunOwnership(run_dir)
    start.wait()
    try:
        results.put(ownership.try_take() or ownership.try_take())
    except LaunchError:
        results.put(False)
    start.wait()


@pytest.mark.parametrize("has_dead_owner", [False, True])
def test_one_of_several_that_come_at_the_same_time_gets_it(
    tmp_path: Path, owner: BaseProcess, has_dead_owner: bool
) -> None:
    folder = tmp_path / "run" if has_dead_owner else tmp_path / "new"
    owner.kill()
    owner.join()
    start, results = _FORK.Barrier(4), _FORK.Queue()
    racers = [in_another_process(race, folder, start, results) for _ in range(4)]
    assert sorted(results.get(timeout=30) for _ in racers) == [False, False, False, True]
    for racer in racers:
        racer.join()


def test_who_was_held_up_and_has_lost_the_folder_ends(tmp_path: Path, owner: BaseProcess) -> None:
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGSTOP)
    write_owner(tmp_path / "run")
    os.kill(owner.pid, signal.SIGCONT)
    owner.join(30)
    assert owner.exitcode == 1
    assert pid_of(tmp_path / "run") == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError) as caught:
        RunOwnership(tmp_path / "file" / "run").try_take()
    assert f"{caught.value}".startswith(f"run_dir '{tmp_path}/file/run' cannot be used: Not a directory (")
