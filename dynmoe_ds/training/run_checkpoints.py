"""The checkpoints of a run: when they are written, which of them stay, and where a restarted run goes on."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from dynmoe_ds.checkpoint.store import find_checkpoint, list_checkpoints, open_checkpoint, remove_old
from dynmoe_ds.config.schema import CheckpointConfig
from dynmoe_ds.distributed import assert_same_on_all_ranks, attempt_together
from dynmoe_ds.engine import Engine
from dynmoe_ds.errors import CheckpointError, DivergenceError
from dynmoe_ds.telemetry.run_folder import CHECKPOINT_FOLDER, FINISHED_FILE

logger = logging.getLogger(__name__)


class Preempted(Exception):
    """Training was asked to stop, and stopped after optimiser step `step` with a checkpoint. Raised on every rank."""

    def __init__(self, step: int, path: Path) -> None:
        super().__init__(f"Stopped after optimiser step {step}, as asked. {path} was written.")
        self.step = step
        self.path = path


class RunCheckpoints:
    """Writes and finds the checkpoints in `<run_dir>/checkpoints`, which all ranks must see.

    A checkpoint that cannot be written is reported, and training goes on: the next one is another chance.
    """

    def __init__(self, config: CheckpointConfig, run_dir: str | Path, engine: Engine) -> None:
        self.config = config
        self.folder = Path(run_dir) / CHECKPOINT_FOLDER
        self._engine = engine

    def resume(self) -> int:
        """Go on from the latest checkpoint if there is one and `resume` is `auto`; the optimiser steps taken so far.

        Collective: every rank. Raises: as `go_back` and `are_there`.
        """
        if self.config.resume != "auto" or not self.are_there():
            return 0
        path = self.go_back()
        if dist.get_rank() == 0:
            logger.info("Going on from %s.", path)
        return self._engine.global_steps

    def go_back(self) -> Path:
        """Load the latest checkpoint, which is another one if a write in the background has failed; its path.

        Collective: every rank. Raises: CheckpointError on every rank for one that cannot be used, with what to do about
        it if it is damaged.
        """
        self.settle()
        try:
            path, _ = self._engine.load_checkpoint(self.folder)
        except (CheckpointError, DivergenceError) as error:
            if advice := self._advice_if_damaged():
                raise CheckpointError(f"{error} {advice}") from error
            raise
        return path

    def are_there(self) -> bool:
        """Whether there is a checkpoint.

        Collective: every rank. Raises: CheckpointError if a rank cannot read the folder, on the others a
        DivergenceError that quotes it; DivergenceError if the ranks do not see the same checkpoints.
        """
        present = attempt_together(self._list)
        advice = "The run folder must be on a disk that all ranks share."
        assert_same_on_all_ranks("the checkpoints that are there", {f"{self.folder}": present}, advice=advice)
        return bool(present)

    def is_due(self, done: int) -> bool:
        """Whether a checkpoint follows optimiser step `done`."""
        return self.config.every_steps is not None and done % self.config.every_steps == 0

    def save(self) -> None:
        """Write a checkpoint now, or begin to. Collective: every rank."""
        self.settle()
        try:
            self._engine.save_checkpoint(self.folder, asynchronous=self.config.asynchronous)
        except (CheckpointError, DivergenceError) as error:
            _report(error)
        if not self.config.asynchronous:
            self.settle()

    def save_and_stop(self) -> NoReturn:
        """Write a checkpoint and end the training.

        Collective: every rank. Raises: Preempted; CheckpointError, or DivergenceError, if it cannot be written.
        """
        self.settle()
        path = self._engine.save_checkpoint(self.folder)
        raise Preempted(self._engine.global_steps, path)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, then remove those that are too many.

        Collective: every rank.
        """
        try:
            self._engine.wait_for_checkpoint()
        except (CheckpointError, DivergenceError) as error:
            _report(error)
            return
        if dist.get_rank() == 0 and self.folder.is_dir():
            try:
                remove_old(self.folder, self.config.keep)
            except OSError as error:
                logger.warning("Old checkpoints in %s cannot be removed: %s.", self.folder, error.strerror)

    def settle_at_the_end(self) -> None:
        """As `settle`, in a run that ends by an error, which no error of the save may hide."""
        try:
            self.settle()
        except Exception as error:
            logger.warning("The checkpoint in the background did not come to its end: %s", error)

    def _list(self) -> list[int]:
        """The steps of the checkpoints that are there. Raises: CheckpointError if the folder cannot be read."""
        try:
            return list(list_checkpoints(self.folder))
        except OSError as error:
            raise CheckpointError(
                f"The checkpoints in {self.folder} cannot be listed: {error.strerror}. All ranks must be able to read "
                "the run folder."
            ) from error

    def _advice_if_damaged(self) -> str:
        """How to do without the latest checkpoint if a rank finds it damaged; nothing if it is of another model.

        Nobody is asked to delete it, and none is passed over by itself: how much work that loses is for people to see.
        Collective: every rank.
        """
        advice, is_damaged = "", False
        try:
            path = find_checkpoint(self.folder)
            others = [other.name for other in list_checkpoints(self.folder).values() if other.name != path.name]
            then = f"goes on from {others[-1]}" if others else "begins anew, since there is no other"
            advice = f"To go on without it, move {path} away: the same command then {then}."
            open_checkpoint(path, dist.get_rank(), dist.get_world_size())
        except Exception:  # the error at hand says what it is
            is_damaged = True
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (is_damaged, advice))
        return max(advice for _, advice in everyone) if any(damaged for damaged, _ in everyone) else ""


def clear_results(run_dir: str | Path, *names: str) -> None:
    """Remove the mark and the folders `names` that an earlier end of a run has left, which this end writes anew."""
    (Path(run_dir) / FINISHED_FILE).unlink(missing_ok=True)
    for name in names:
        shutil.rmtree(Path(run_dir) / name, ignore_errors=True)


def mark_finished(run_dir: str | Path, steps: int) -> None:
    """Leave the mark by which a run that came to its end is known, whatever code its launcher returned."""
    (Path(run_dir) / FINISHED_FILE).write_text(json.dumps({"steps": steps}) + "\n", encoding="utf-8")


def _report(error: Exception) -> None:
    if dist.get_rank() == 0:
        logger.warning("No checkpoint was written: %s", error)
