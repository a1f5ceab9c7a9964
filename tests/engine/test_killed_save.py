"""A rank that is killed in a save leaves the checkpoint before it whole, and the next one can be written."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import dynmoe_ds as dm
from dynmoe_ds.checkpoint import store
from tests.helpers.models import TinyModel, deepspeed_config, train
from tests.helpers.spawn import RankFailed, run_ranks

# Where in a save, and which rank: its functions in the order in which they are called.
MOMENTS = {
    "before anything is written": ("_prepare", 0),
    "before a rank's own file": ("_save", 1),
    "between the tensors and the checksums": ("_own_files", 1),
    "before the manifest": ("_finish", 0),
    "before the rename": ("publish", 0),
    "between the rename and the note of the latest": ("flush", 0),
}


def make(rank: int, world_size: int) -> Any:
    return dm.initialize(TinyModel(2), deepspeed_config(2))


def be_killed(rank: int, world_size: int, folder: str, function: str, victim: int) -> None:
    engine = make(rank, world_size)
    train(engine, range(2), rank, world_size)
    engine.save_checkpoint(folder)
    train(engine, range(2, 4), rank, world_size)
    ordinary = getattr(store, function)

    def die(*args: Any, **kwargs: Any) -> Any:
        is_late = function != "flush" or (Path(folder) / "step-00000004").exists()
        if rank == victim and is_late:
            os.kill(os.getpid(), signal.SIGKILL)
        return ordinary(*args, **kwargs)

    setattr(store, function, die)
    engine.save_checkpoint(folder)


def go_on(rank: int, world_size: int, folder: str) -> tuple[int, list[float]]:
    engine = make(rank, world_size)
    engine.load_checkpoint(folder)
    first = engine.global_steps
    losses = train(engine, range(first, 6), rank, world_size)
    engine.save_checkpoint(folder)
    if rank == 0:
        store.remove_old(Path(folder), keep=1)
    return first, losses


def undisturbed(rank: int, world_size: int) -> list[float]:
    return train(make(rank, world_size), range(6), rank, world_size)


@pytest.fixture(scope="module")
def want() -> list[float]:
    return run_ranks(undisturbed, 2)[0]


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_checkpoint_before_stays_whole(tmp_path: Path, moment: str, want: list[float]) -> None:
    with pytest.raises(RankFailed):
        run_ranks(be_killed, 2, f"{tmp_path}", *MOMENTS[moment])
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    first, losses = run_ranks(go_on, 2, f"{tmp_path}")[0]
    assert first == 2 and losses == want[2:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000006"], "leftovers stay"
