"""Jobs of a real Slurm with two virtual nodes: submitted, preempted, requeued, swept, refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from dynmoe_ds.telemetry.run_state import read_state
from tests.cluster.conftest import (
    DEMO,
    PATIENCE_S,
    ROOT,
    RUN,
    assert_shared_experts,
    dynmoe,
    environment,
    last_step,
    left_alone,
    what_was_written,
)
from tests.cluster.virtual_slurm import VirtualSlurm
from tests.cluster.watching import Watcher

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3 * PATIENCE_S)]

# The virtual nodes have no names that resolve, and gloo would look for one.
NODES = ("launch=slurm", "launch.gpus_per_node=0", "launch.nodes=2", "launch.environment=['GLOO_SOCKET_IFNAME=lo']")


def launch(slurm: VirtualSlurm, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {**environment(), **{k: slurm.environment[k] for k in ("SLURM_CONF", "PATH")}, **variables}
    return subprocess.run(
        dynmoe("launch", *NODES, *overrides), cwd=ROOT, env=own, capture_output=True, text=True, timeout=PATIENCE_S
    )


def job_number(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.split("submitted job ")[1].partition(";")[0]


def stopped_at(folder: Path) -> int:
    """The optimiser step of a run's latest checkpoint."""
    return int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))


def copy_of_the_code(folder: Path) -> Path:
    for name in ("dynmoe_ds", "dynmoe_kernels", "dynmoe_configs"):
        spec = find_spec(name)
        assert spec is not None and spec.submodule_search_locations
        shutil.copytree(spec.submodule_search_locations[0], folder / name)
    return folder


def test_a_preempted_job_goes_on_with_its_own_code_and_ends_like_a_run_left_alone(
    slurm: VirtualSlurm, undisturbed: Path, tmp_path: Path
) -> None:
    code = copy_of_the_code(tmp_path / "code")
    folder = tmp_path / "run"
    paths = {"PYTHONPATH": f"{code}", "PYTHONSAFEPATH": "1"}
    job = job_number(launch(slurm, *RUN, "launch.sbatch_options=['--hold']", f"run_dir={folder}", **paths))
    (code / "dynmoe_ds" / "__init__.py").write_text("raise SystemExit('edited after the submission')")
    log = folder / "launch" / f"job-{job}.log"
    assert read_state(folder).told == "Not started: launched, but nothing is written yet."
    slurm.call("scontrol", "release", job)
    slurm.wait_for(lambda: last_step(folder) >= 3, PATIENCE_S)
    assert re.match(r"Running: step \d+ of 60, about ", read_state(folder).told), read_state(folder)

    slurm.call("scancel", "--signal=USR1", "--batch", job)
    slurm.wait_for_restart(job)
    stopped = stopped_at(folder)
    assert 3 <= stopped < 60 and not (folder / "finished.json").exists()
    assert read_state(folder).told.startswith(
        f"Stopped at step {stopped} of 60. Stopped after optimiser step {stopped}, as asked. {folder}/checkpoints/step-"
    )
    assert slurm.wait_for_end(job) == "COMPLETED", log.read_text()[-4000:]
    assert read_state(folder).told == "Finished: all 60 steps are done."

    said = log.read_text()
    assert f"Stopped after optimiser step {stopped}, as asked." in said and "edited" not in said
    assert f"Going on from {folder}/checkpoints/step-{stopped:08}." in said, "one log, not written anew"
    assert what_was_written(folder) == what_was_written(undisturbed)
    assert_shared_experts(folder)


def test_the_demo_that_was_preempted_has_the_same_losses(slurm: VirtualSlurm, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = job_number(launch(slurm, *DEMO, f"run_dir={folder}"))
    slurm.wait_for(lambda: last_step(folder) >= 3, PATIENCE_S)
    slurm.call("scancel", "--signal=USR1", "--batch", job)
    slurm.wait_for_restart(job)
    assert 3 <= stopped_at(folder) < 60
    assert slurm.wait_for_end(job) == "COMPLETED", (folder / "launch" / f"job-{job}.log").read_text()[-4000:]
    assert what_was_written(folder) == what_was_written(left_alone(tmp_path / "undisturbed", *DEMO))
    assert_shared_experts(folder)


def test_the_demo_stops_before_its_time_is_over_and_goes_on_by_itself(slurm: VirtualSlurm, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    own = (
        "training.steps=100000", "training.log_every_steps=1", "training.sample_tokens=0", "telemetry=disabled",
        "launch.time=00:03:00", "launch.signal_s=60",
    )  # fmt: skip
    job = job_number(launch(slurm, "experiment=demo", *own, "launch.sbatch_options=['--hold']", f"run_dir={folder}"))
    log = folder / "launch" / f"job-{job}.log"
    with Watcher(folder) as watcher:
        assert watcher.told == [("not started", "Not started: launched, but nothing is written yet.")]
        slurm.call("scontrol", "release", job)
        # Nobody but Slurm signals: in the second of the three minutes, as it may be early by one. So each life has a
        # minute in which it is seen to run.
        slurm.wait_for_restart(job)
        stopped = stopped_at(folder)
        assert stopped >= 1 and f"Stopped after optimiser step {stopped}, as asked." in log.read_text()
        slurm.wait_for(
            lambda: last_step(folder) > stopped and watcher.words()[-2:] == ["stopped", "running"], PATIENCE_S
        )
        assert f"Going on from {folder}/checkpoints/step-{stopped:08}." in log.read_text()
        assert "DUE TO TIME LIMIT" not in log.read_text()

        slurm.call("scancel", job)
        assert slurm.wait_for_end(job) == "CANCELLED"
        slurm.wait_for(lambda: stopped_at(folder) > stopped and watcher.words()[-1] == "stopped")
    # On a busy machine its time may be over once more before it is cancelled.
    assert re.fullmatch("not started( running stopped){2,}", " ".join(watcher.words())), watcher.told
    assert any(re.match(r"Running: step \d+ of 100000", told) for told in watcher.said("running")), watcher.told


def test_a_node_that_fails_before_the_first_checkpoint(slurm: VirtualSlurm, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = job_number(launch(slurm, *RUN, "checkpoint.every_steps=null", f"run_dir={folder}"))
    slurm.wait_for(lambda: last_step(folder) >= 3, PATIENCE_S)
    slurm.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    slurm.wait_for(lambda: slurm.job(job).get("JobState") == "PENDING", PATIENCE_S)
    slurm.call("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)  # or it has come back by itself
    assert slurm.wait_for_end(job) == "COMPLETED", (folder / "launch" / f"job-{job}.log").read_text()[-4000:]
    assert what_was_written(folder) == what_was_written(undisturbed)


def test_a_sweep_is_one_array_whose_tasks_are_preempted_one_by_one(slurm: VirtualSlurm, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    # So many steps that the other one still runs, on a fast machine too, when one has been preempted.
    own = (
        "launch.nodes=1", "parallel=single", "training.steps=1500", "training.eval_every_steps=500",
        "checkpoint.every_steps=500", "optim.lr=1e-3,1e-2",
    )  # fmt: skip
    done = launch(slurm, *RUN, *own, f"run_dir={folder}")
    job = job_number(done)
    assert done.stdout.splitlines()[1:] == ["run\toptim.lr", "0\t0.001", "1\t0.01"]
    slurm.wait_for(lambda: min(last_step(folder / f"{number}") for number in (0, 1)) >= 3, PATIENCE_S)
    tasks = [f"{job}_{number}" for number in (0, 1)]
    # The last task's own number is that of the whole array, the other's is not.
    assert [slurm.job(task)["JobId"] == job for task in tasks] == [False, True]
    slurm.call("scancel", "--signal=USR1", "--batch", tasks[1])
    slurm.wait_for_restart(tasks[1])
    other = slurm.job(tasks[0])
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    slurm.call("scancel", "--signal=USR1", "--batch", tasks[0])
    slurm.wait_for_restart(tasks[0])
    for task in tasks:
        log = folder / "launch" / f"job-{task}.log"
        assert slurm.wait_for_end(task) == "COMPLETED", log.read_text()[-4000:]
        assert slurm.job(task)["Restarts"] == "1", "not with the other, too"
        assert log.read_text().count("as asked") == log.read_text().count("Going on from") == 1
    rates = [yaml.safe_load((folder / f"{number}" / "config.yaml").read_text())["optim"]["lr"] for number in (0, 1)]
    assert rates == [1e-3, 1e-2]
    assert (folder / "sweep.tsv").read_text() == "run\toptim.lr\n0\t0.001\n1\t0.01\n"
    first, second = (what_was_written(folder / f"{number}")["metrics"][-1] for number in (0, 1))
    assert first["train/loss"] != second["train/loss"]

    told = subprocess.run(
        dynmoe("report", f"{folder}"), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert told.returncode == 0, told.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in told.stdout.splitlines() if line[:1] == "|"]
    assert rows[0] == ["run", "optim.lr", "state", "steps"]
    assert rows[2:] == [["0", "0.001", "finished", "1500 of 1500"], ["1", "0.01", "finished", "1500 of 1500"]]
    assert (folder / "report.html").exists()


def test_what_sbatch_refuses_is_said_in_its_words(slurm: VirtualSlurm, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = launch(slurm, *RUN, "launch.partition=nowhere", f"run_dir={folder}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"dynmoe: sbatch refused {folder}/launch/job.sbatch:\n")
    assert "invalid partition specified: nowhere" in done.stderr and "Nothing was submitted." in done.stderr


def test_a_folder_is_of_one_job_at_a_time(slurm: VirtualSlurm, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    held = (*RUN, "launch.sbatch_options=['--hold']", f"run_dir={folder}")
    job = job_number(launch(slurm, *held))
    again = launch(slurm, *held)
    assert (again.returncode, again.stderr) == (
        2,
        f"dynmoe: Job {job} was launched into {folder} and is PENDING. Wait for it, end it with `scancel {job}`, or "
        "use another run_dir.\n",
    )
    slurm.call("scancel", job)
    assert job_number(launch(slurm, *held)) != job
    slurm.call("scancel", "-u", "root")
