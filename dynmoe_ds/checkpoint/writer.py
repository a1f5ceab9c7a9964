"""Writing checkpoints now or in the background, one at a time."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from dynmoe_ds.checkpoint.store import Snapshot, checkpoint_name, write_checkpoint
from dynmoe_ds.distributed import group_timeout

SAVE_PATIENCE = 3
"""Ranks wait for each other's disks this many times as long as in other collectives. A disk that stalls would else end
a run whose ranks are all well; a rank that hangs is found by the training beside a save that goes on in the background.
"""


class CheckpointWriter:
    """Writes one checkpoint after another, over a process group of its own, beside which training can go on.

    group: all ranks, on host memory. Collective: construction, by every rank.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=SAVE_PATIENCE * group_timeout())
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[Path] | None = None

    def write(self, snapshot: Snapshot, folder: Path, *, asynchronous: bool = False) -> Path:
        """Write a snapshot into `folder`; where it is, or is going to be.

        Collective: every rank, after `wait`. Raises: CheckpointError on every rank, unless asynchronous: then `wait`
        raises it.
        """
        assert self._pending is None, "the last checkpoint has not been waited for"
        if not asynchronous:
            return write_checkpoint(snapshot, folder, self.group)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(write_checkpoint, snapshot, folder, self.group)
        return folder / checkpoint_name(snapshot.step)

    def wait(self) -> None:
        """Wait for the checkpoint in the background. Raises: CheckpointError on every rank, once, if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
