"""Two hosts: the launchers across them, experts shared between them, a stop by a signal, and a cable that is pulled."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import (
    PATIENCE_S,
    ROOT,
    RUN,
    assert_shared_experts,
    dynmoe,
    environment,
    last_step,
    what_was_written,
)
from tests.cluster.two_hosts import NAMES, TwoHosts, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3 * PATIENCE_S)]

TIMEOUT_S = 20
KINDS = ("hosts_torchrun", "hosts_pdsh", "hosts_openmpi")
_PROGRAM = {"hosts_torchrun": "ssh", "hosts_pdsh": "pdsh", "hosts_openmpi": "mpirun"}


class Launch:
    """`dynmoe launch` on the first host, with what it says in a file."""

    def __init__(self, hosts: TwoHosts, kind: str, folder: Path, *overrides: str) -> None:
        if reason := why_not(_PROGRAM[kind]):
            pytest.skip(reason)
        own = [
            f"launch={kind}", f"launch.hostfile={hosts.hostfile}", f"run_dir={folder}",
            f"launch.ssh_options={list(hosts.ssh_options)}",
            # Of this process's own environment ssh hands nothing on. tests/conftest.py says what the last one is for.
            f"launch.environment=['GLOO_SOCKET_IFNAME=eth0','DS_ACCELERATOR=cpu','MKL_CBWR={os.environ['MKL_CBWR']}']",
        ]  # fmt: skip
        if kind == "hosts_openmpi":
            own.append("launch.runner_options=['--allow-run-as-root','--mca','btl_tcp_if_include','eth0']")
        self._log = folder.with_suffix(f".{kind}.log")
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                hosts.words(0, *dynmoe("launch", *own, *RUN, *overrides)),
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=log,
            )

    def said(self) -> str:
        return self._log.read_text()

    def code(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code, for which it waits."""
        return self.process.wait(timeout_s)


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    """Those of a test; what is left of them at its end is killed, and the ranks find that out."""
    started: list[Launch] = []
    yield started
    for one in started:
        one.process.kill()
        one.process.wait()


def start(launches: list[Launch], hosts: TwoHosts, kind: str, folder: Path, *overrides: str) -> Launch:
    launches.append(Launch(hosts, kind, folder, *overrides))
    return launches[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_shared_by_two_hosts_and_a_signal_stops_both(
    kind: str, hosts: TwoHosts, undisturbed: Path, tmp_path: Path, launches: list[Launch]
) -> None:
    folder = tmp_path / "run"
    before = [hosts.sent_bytes(number) for number in range(2)]
    first = start(launches, hosts, kind, folder)
    hosts.wait_for(lambda: last_step(folder) >= 3 or first.process.poll() is not None, PATIENCE_S)
    assert [bool(hosts.trainers(number)) for number in range(2)] == [True, True], first.said()[-4000:]
    first.process.send_signal(signal.SIGUSR1)
    assert first.code() == 85, first.said()[-4000:]
    assert "as asked" in first.said() and not (folder / "finished.json").exists()
    hosts.wait_for(lambda: not hosts.trainers(0) and not hosts.trainers(1))

    second = start(launches, hosts, kind, folder)
    assert second.code() == 0, second.said()[-4000:]
    assert "Going on from" in second.said()
    assert what_was_written(folder) == what_was_written(undisturbed)
    assert_shared_experts(folder)
    assert all(hosts.sent_bytes(number) > before[number] for number in range(2)), "over the cable"


def test_another_job_is_kept_out_of_the_folder_from_both_hosts_and_ctrl_c_ends_the_first(
    hosts: TwoHosts, tmp_path: Path, launches: list[Launch]
) -> None:
    folder = tmp_path / "run"
    first = start(launches, hosts, "hosts_torchrun", folder, "training.steps=100000")
    hosts.wait_for(lambda: last_step(folder) >= 3 or first.process.poll() is not None, PATIENCE_S)
    before = (folder / "launch" / "config.yaml").stat().st_mtime_ns
    beside = start(launches, hosts, "hosts_pdsh", folder)
    assert beside.code() == 2
    assert f"dynmoe: run_dir '{folder}' is in use by process " in beside.said()
    assert (folder / "launch" / "config.yaml").stat().st_mtime_ns == before
    # Of another container, which sees signs of life only.
    alone = dynmoe("train", *RUN, "parallel=single", f"run_dir={folder}")
    done = subprocess.run(
        hosts.words(1, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *alone),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 2 and "Waiting for up to 60 s for a sign of life of it." in done.stderr
    assert f"[rank 0] run_dir '{folder}' is in use by process " in done.stderr, done.stderr[-4000:]

    step = last_step(folder)
    hosts.wait_for(lambda: last_step(folder) > step or first.process.poll() is not None, PATIENCE_S)
    first.process.send_signal(signal.SIGINT)
    assert first.code(90) == 130 and first.said().splitlines()[-1] == "interrupted"
    hosts.wait_for(lambda: not hosts.trainers(0) and not hosts.trainers(1))


def wait_for_the_end_of_the_ranks(hosts: TwoHosts) -> None:
    """Those of both hosts, within the time-out and what it takes to say so and to end.

    Unlike other limits here this one is what is tested, and a machine too busy to keep it is a failure.
    """
    hosts.wait_for(lambda: not hosts.ranks(0) and not hosts.ranks(1), TIMEOUT_S + 20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_that_is_cut_off_is_an_error_on_both_and_the_job_goes_on_later(
    kind: str, hosts: TwoHosts, undisturbed: Path, tmp_path: Path, launches: list[Launch]
) -> None:
    folder = tmp_path / "run"
    first = start(launches, hosts, kind, folder, f"parallel.process_group_timeout_s={TIMEOUT_S}")
    try:
        hosts.wait_for(lambda: last_step(folder) >= 12 or first.process.poll() is not None, PATIENCE_S)
        assert [bool(hosts.ranks(number)) for number in range(2)] == [True, True], first.said()[-4000:]
        hosts.cut()
        wait_for_the_end_of_the_ranks(hosts)
        # What started them: ssh ends after 15 s without an answer.
        hosts.wait_for(lambda: not hosts.trainers(0) and not hosts.trainers(1), 40)
        assert first.code(60) not in (0, 85), first.said()[-4000:]
    finally:
        hosts.mend()
    # mpirun ends the ranks before their time-out, as soon as ssh does not answer.
    by_mpirun = "dynmoe: the job has failed (exit code 255)."
    by_rank = f"Another rank did not take part within {TIMEOUT_S} s"
    assert (by_mpirun if kind == "hosts_openmpi" else by_rank) in first.said(), first.said()[-4000:]
    assert not (folder / "finished.json").exists()

    second = start(launches, hosts, kind, folder)
    assert second.code() == 0, second.said()[-4000:]
    assert f"Going on from {folder}/checkpoints/step-000000" in second.said()
    assert what_was_written(folder) == what_was_written(undisturbed)


def test_started_by_hand_both_hosts_say_that_they_are_cut_off(
    hosts: TwoHosts, tmp_path: Path, launches: list[Launch]
) -> None:
    """By the lines that `launch.start=print` prints: what each host says has a file of its own."""
    folder = tmp_path / "run"
    wanted = ("launch.start=print", f"parallel.process_group_timeout_s={TIMEOUT_S}", "training.steps=100000")
    printing = start(launches, hosts, "hosts_torchrun", folder, *wanted)
    assert printing.code() == 0, printing.said()
    # Each after its host's name; a library may have warned around them.
    printed = printing.said().splitlines()
    lines = [printed[printed.index(f"# {name}") + 1] for name in NAMES]

    logs = [tmp_path / f"{name}.log" for name in NAMES]
    errors = [f"[rank {rank}] Another rank did not take part within {TIMEOUT_S} s" for rank in range(2)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, line in enumerate(lines):
            with logs[number].open("w") as log:
                words = hosts.words(number, "bash", "-c", line)
                started.append(subprocess.Popen(words, cwd="/", env=environment(), stdout=log, stderr=log))
        hosts.wait_for(lambda: last_step(folder) >= 3 or any(one.poll() is not None for one in started), PATIENCE_S)
        assert [bool(hosts.ranks(number)) for number in range(2)] == [True, True], logs[0].read_text()[-4000:]
        hosts.cut()
        # Both within the time-out and what it takes to say so.
        hosts.wait_for(
            lambda: all(error in log.read_text() for error, log in zip(errors, logs, strict=True)), TIMEOUT_S + 10
        )
        wait_for_the_end_of_the_ranks(hosts)
        codes = [one.wait(40) for one in started]
    finally:
        hosts.mend()
        for one in started:
            one.kill()
            one.wait()
        hosts.kill_trainers()  # the rank is not ended by the end of what started it
    assert all(codes), codes
