"""`dynmoe train` as a user starts it: whichever of its processes is stopped or killed, soon nothing is left of it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dynmoe_ds.cli.launcher_watch import CHECKPOINT_GRACE_S
from tests.helpers.command import ROOT, Started
from tests.helpers.spawn import free_port

# What the documentation promises: a second to notice, the time for a checkpoint, and a busy machine.
WITHIN_S = CHECKPOINT_GRACE_S + 15


class Job(Started):
    """The front end, DeepSpeed's two processes and two ranks, in the middle of a training of several minutes."""

    def __init__(self, folder: Path, *overrides: str, by: str = "front") -> None:
        """by: `front`, `deepspeed` or `torchrun`, the launchers themselves."""
        self.folder = folder
        verb = ["train", "experiment=smoke", f"run_dir={folder}", "training.steps=100000", "telemetry=disabled"]
        verb += ["checkpoint.every_steps=5000", "training.eval_every_steps=100000", "training.log_every_steps=1"]
        verb += overrides
        port = f"{free_port()}"
        command = {
            "front": ["dynmoe_ds"],
            "deepspeed": [
                "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", "1", "--master_port", port,
                "--module", "dynmoe_ds",
            ],
            "torchrun": [
                "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "--module", "dynmoe_ds",
            ],
        }[by]  # fmt: skip
        self.has_front = by == "front"
        words = [sys.executable, "-m", *command, *verb]
        super().__init__(words, folder.with_name("output.txt"), PYTHONPATH=f"{ROOT}")

    @property
    def runner(self) -> psutil.Process:
        """DeepSpeed's front process."""
        process = psutil.Process(self.process.pid)
        return process.children()[0] if self.has_front else process

    @property
    def launch(self) -> psutil.Process:
        """DeepSpeed's second process, the parent of the ranks."""
        return self.runner.children()[0]

    @property
    def ranks(self) -> list[psutil.Process]:
        return sorted(self.launch.children(), key=lambda rank: rank.environ()["RANK"])

    def end(self) -> tuple[int, str, float]:
        """The exit code, what was said, and after how long nothing was left."""
        begun = time.monotonic()
        code = self.process.wait(timeout=WITHIN_S)
        _, alive = psutil.wait_procs(self.seen, timeout=max(0.0, WITHIN_S - (time.monotonic() - begun)))
        assert not alive, f"left behind: {[(one.pid, one.cmdline()) for one in alive]}"
        took = time.monotonic() - begun
        print(f"nothing left after {took:.1f} s, exit code {code}")
        return code, self.output.read_text(), took

    def latest(self) -> str | None:
        path = self.folder / "checkpoints" / "latest"
        return path.read_text().strip() if path.exists() else None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(*overrides: str, by: str = "front", wait_for: str = "metrics.jsonl") -> Job:
        jobs.append(Job(tmp_path / "run", *overrides, by=by))
        path = tmp_path / "run" / wait_for
        jobs[-1].wait_until(lambda: path.exists() and path.stat().st_size > 0)
        return jobs[-1]

    yield make
    for job in jobs:
        job.kill()


@pytest.mark.launcher
def test_after_a_rank_was_killed_the_same_command_goes_on_until_sigterm(start: Callable[..., Job]) -> None:
    job = start("checkpoint.every_steps=20", wait_for="checkpoints/latest")
    job.ranks[1].kill()
    code, said, _ = job.end()
    assert code == 247 and "a rank was ended by SIGKILL" in said, said
    before = f"{job.latest()}"

    job = start("checkpoint.every_steps=20", wait_for="checkpoints/latest")
    job.wait_until(lambda: f"{job.latest()}" > before)
    assert f"Going on from {job.folder / 'checkpoints'}" in job.output.read_text()
    job.process.send_signal(signal.SIGTERM)
    code, said, _ = job.end()
    assert code == 85, said
    assert "as asked" in said and "Traceback" not in said
    assert not (job.folder / "finished.json").exists()


@pytest.mark.launcher
def test_a_signal_to_every_process_brings_a_checkpoint(start: Callable[..., Job]) -> None:
    """What Slurm and systemd do. DeepSpeed's front process dies of it, and its second one returns 1."""
    job = start()
    for process in [psutil.Process(job.process.pid), job.runner, job.launch, *job.ranks]:
        process.send_signal(signal.SIGTERM)
    code, said, _ = job.end()
    assert code == 85, said
    assert job.latest() is not None


@pytest.mark.launcher
@pytest.mark.parametrize(
    ("which", "overrides"), [("front", ["parallel=single"]), ("runner", ["parallel=single"]), ("launch", [])]
)
def test_nothing_outlives_a_launcher_that_is_killed(
    start: Callable[..., Job], which: str, overrides: list[str]
) -> None:
    job = start(*overrides)
    {"front": psutil.Process(job.process.pid), "runner": job.runner, "launch": job.launch}[which].kill()
    code, said, _ = job.end()
    assert code == (-signal.SIGKILL if which == "front" else 85), said
    assert job.latest() is not None, "the ranks had time for a checkpoint"


@pytest.mark.launcher
def test_ctrl_c_brings_no_checkpoint(start: Callable[..., Job]) -> None:
    job = start("parallel=single")
    job.process.send_signal(signal.SIGINT)
    code, said, _ = job.end()
    assert code == 130 and "Traceback" not in said, said
    assert job.latest() is None


@pytest.mark.launcher
def test_nothing_outlives_deepspeeds_own_command(start: Callable[..., Job]) -> None:
    """SIGUSR1 kills it, since nobody has told it to ignore that; its ranks write a checkpoint all the same."""
    job = start("parallel=single", by="deepspeed")
    job.process.send_signal(signal.SIGUSR1)
    code, said, _ = job.end()
    assert code == -signal.SIGUSR1
    assert job.latest() is not None, said


@pytest.mark.launcher
def test_nothing_outlives_torchrun(start: Callable[..., Job]) -> None:
    """Its agent is the parent of the ranks, and the only process above them.

    It keeps the store, without which ranks make no new process group: that of the checkpoints must be there already.
    """
    job = start("checkpoint.every_steps=1000", by="torchrun")
    assert len(psutil.Process(job.process.pid).children()) == 2
    job.process.kill()
    code, said, _ = job.end()
    assert code == -signal.SIGKILL
    assert "as asked" in said and f"{job.latest()} was written" in said, said
