"""The checkpoints of a run beside an engine that only notes what it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.helpers.spawn import run_ranks

from dynmoe_ds.checkpoint import store
from dynmoe_ds.config.schema import CheckpointConfig
from dynmoe_ds.errors import CheckpointError, DivergenceError
from dynmoe_ds.training.run_checkpoints import Preempted, RunCheckpoints


class NotedEngine:
    """An engine without weights, whose write in the background has failed if there is an `error`."""

    device = torch.device("cpu")
    global_steps = 7

    def __init__(self) -> None:
        self.error: CheckpointError | None = CheckpointError("The disk is full.")
        self.calls: list[str] = []

    def wait_for_checkpoint(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def save_checkpoint(self, folder: Path) -> Path:
        self.wait_for_checkpoint()
        self.calls.append("save")
        return folder / store.checkpoint_name(7)

    def load_checkpoint(self, folder: Path) -> tuple[Path, None]:
        self.wait_for_checkpoint()
        self.calls.append("load")
        return folder / store.checkpoint_name(7), None


def all_cases(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Rank 0's folder has a checkpoint, that of rank 1 has none."""
    mine = Path(folder) / f"{rank}"
    if rank == 0:
        path = mine / "checkpoints" / store.checkpoint_name(7)
        path.mkdir(parents=True)
        (path / store.MANIFEST_FILE).write_text("{}")
    engine = NotedEngine()
    checkpoints = RunCheckpoints(CheckpointConfig(), mine, engine)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for name in ("are_there", "resume"):
        try:
            getattr(checkpoints, name)()
        except DivergenceError as error:
            found[name] = f"{error}"
    try:
        checkpoints.save_and_stop()
    except Preempted as stopped:
        found["stop"] = f"{stopped}"
    engine.error = CheckpointError("The disk is full again.")
    found["back"] = checkpoints.go_back().name
    never = RunCheckpoints(CheckpointConfig(resume="never"), Path(folder) / "0", engine)  # type: ignore[arg-type]
    found["never"] = never.resume()
    return found | {"calls": engine.calls}


def test_ranks_that_see_other_checkpoints_and_what_follows_a_write_that_failed(tmp_path: Path) -> None:
    for found in run_ranks(all_cases, 2, f"{tmp_path}"):
        for name in ("are_there", "resume"):
            assert "the checkpoints that are there" in found[name] and "share" in found[name]
        assert found["stop"].startswith("Stopped after optimiser step 7, as asked.")
        assert found["never"] == 0
        assert found["back"] == "step-00000007"
        assert found["calls"] == ["save", "load"]
