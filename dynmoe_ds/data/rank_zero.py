"""What rank 0 makes once and every rank gets, errors included."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from dynmoe_ds.errors import DynMoEError

T = TypeVar("T")


def from_rank_zero(make: Callable[[], T]) -> T:
    """What `make()` returns on rank 0, on every rank; without torch.distributed, simply `make()`.

    The result must survive pickling. A failure on rank 0 is raised on every rank, so that it cannot become a hang: a
    DynMoEError as it is, anything else as a DynMoEError that names it.

    Collective: every rank of the default group, also those that do not run `make`.
    """
    if not dist.is_initialized():
        return make()
    result: list[T | None] = [None]
    failure: list[DynMoEError | None] = [None]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result[0] = make()
        except Exception as error:
            cause = error
            failure[0] = error if isinstance(error, DynMoEError) else DynMoEError(f"Rank 0 failed: {error!r}")
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0] from (cause if cause is not failure[0] else None)
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]  # None only if `make` returned None
