"""Whole parameters, also where ZeRO-3 holds them in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
from torch import Tensor


@contextmanager
def whole(tensor: Tensor) -> Iterator[Tensor]:
    """A parameter or buffer of this rank as its next forward would use it; read it inside the `with` block only.

    Collective at ZeRO-3: the ranks among which the parameter is split.
    """
    with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
        yield tensor.detach()
