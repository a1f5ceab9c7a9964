"""What is in a checkpoint, and in what two differ, without a model and without ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dynmoe_ds.checkpoint.store import Checkpoint

_BYTES_AT_ONCE = 2**28


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One entry that two checkpoints do not share. what: in words. greatest: the largest difference of two elements."""

    name: str
    what: str
    greatest: float | None = None


def differences(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """The entries in which two checkpoints differ, in the order of their names."""
    common = []
    for name in sorted(a.sizes.keys() | b.sizes.keys()):
        if name not in b.sizes or name not in a.sizes:
            yield Difference(name=name, what="only in the first" if name in a.sizes else "only in the second")
        elif a.sizes[name] != b.sizes[name]:
            yield Difference(name=name, what=f"shape {list(a.sizes[name])} and {list(b.sizes[name])}")
        else:
            common.append(name)
    for part in _parts(a, common):
        first, second = a.read_alone(part), b.read_alone(part)
        for name in part:
            x, y = first[name], second[name]
            if not torch.equal(x, y):
                gap = (x.double() - y.double()).abs()
                differing = int((x != y).sum())
                what = f"{differing} of {x.numel()} elements"
                yield Difference(name=name, what=what, greatest=float(gap.max()) if gap.numel() else math.nan)


def _parts(checkpoint: Checkpoint, names: list[str]) -> Iterator[list[str]]:
    """Names in parts that fit into memory."""
    part: list[str] = []
    size = 0
    for name in names:
        part.append(name)
        size += 8 * checkpoint.sizes[name].numel()
        if size > _BYTES_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part
