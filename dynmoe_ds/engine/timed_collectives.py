"""DeepSpeed's collectives, timed as ours are."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from dynmoe_ds.distributed import communication

# Of DeepSpeed 0.19.8's backend object, through which all of its collectives go that belong to a training step.
# DeepSpeed's own timing (`comms_logger`) waits for the device after each of them.
COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_reduce", "all_reduce_coalesced",
    "all_to_all", "all_to_all_single", "barrier", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip


def time_collectives(backend: Any) -> None:
    """Let the collectives of DeepSpeed's backend object count as `communication`. Calling it again changes nothing."""
    for name in COLLECTIVES:
        collective = getattr(backend, name)
        if not isinstance(collective, _Timed):
            setattr(backend, name, _Timed(collective))


class _Timed:
    """A collective whose stalls are counted: where it blocks, or where what it gives is waited for."""

    def __init__(self, collective: Any) -> None:
        self._collective = collective

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        group = next((one for one in given if isinstance(one, dist.ProcessGroup)), None)
        with communication(group):
            work = self._collective(*args, **kwargs)
        return _TimedWork(work, group) if hasattr(work, "wait") else work


class _TimedWork:
    """The handle of an asynchronous collective."""

    def __init__(self, work: Any, group: dist.ProcessGroup | None) -> None:
        self._work, self._group = work, group

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with communication(self._group):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
