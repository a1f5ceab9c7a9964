"""A run whose folder another process trains into."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.run_config import small_run
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import CheckpointConfig, RunConfig
from dynmoe_ds.errors import LaunchError
from dynmoe_ds.telemetry.run_owner import OWNER_FILE, RunOwnership
from dynmoe_ds.training.trainer import Trainer


def refusal(rank: int, world_size: int, run: RunConfig) -> str:
    try:
        Trainer(run)
    except LaunchError as error:
        return f"{error}"
    return "none"


def owner_in_training(rank: int, world_size: int, run: RunConfig) -> tuple[int, bool]:
    """Whose the folder is at the second step, and whether it is anybody's afterwards."""
    pids: list[int] = []
    file = Path(run.run_dir) / OWNER_FILE

    def look() -> bool:
        pids.append(json.loads(file.read_text())["pid"])
        return False

    Trainer(run, should_stop=look).run()
    return pids[1], file.exists()


def test_every_rank_says_so_and_nothing_is_written(tmp_path: Path) -> None:
    run = small_run(
        tmp_path, parallel__num_ranks=2, parallel__ep_size=2, training__steps=4,
        checkpoint=CheckpointConfig(every_steps=4), training__save_model=False,
    )  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    ownership = RunOwnership(tmp_path)
    assert ownership.try_take()
    first, second = run_ranks(refusal, 2, run)
    assert first == second and first.startswith(f"run_dir '{tmp_path}' is in use by process ")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", OWNER_FILE}
    ownership.release()
    (first_pid, is_owned), (second_pid, _) = run_ranks(owner_in_training, 2, run)
    assert first_pid == second_pid and not is_owned
    assert (tmp_path / "finished.json").exists()


def fail_to_build(rank: int, world_size: int, run: RunConfig) -> bool:
    def fail(stream: object) -> None:
        raise ValueError("the model cannot be built")

    trainer = Trainer.__new__(Trainer)
    trainer._build = fail  # type: ignore[method-assign]
    try:
        trainer.__init__(run)  # type: ignore[misc]
    except ValueError:
        return Path(run.run_dir).exists()
    return True


def test_a_run_that_fails_at_its_start_leaves_no_folder(tmp_path: Path) -> None:
    assert run_ranks(fail_to_build, 1, small_run(tmp_path / "run")) == [False]
