"""The arithmetic of a split: in which direction the two halves part, and which hidden units of the child start anew."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_ROUNDS = 50


def split_rows(row: Tensor, direction: Tensor, separation: float) -> Tensor:
    """The gate rows [2, D] of parent and child: `row ± separation |row| direction`, scaled to the length of `row` [D].

    direction: [D] of length 1 at right angles to `row`.
    """
    step = separation * torch.linalg.vector_norm(row) * direction
    return torch.stack([row + step, row - step]) / (1 + separation**2) ** 0.5


def split_direction(tokens: Tensor, row: Tensor, generator: torch.Generator) -> Tensor:
    """A direction [D] of length 1, float64, at right angles to `row` [D]: between the two clusters of tokens [n, D].

    The tokens count by their directions, without what is parallel to `row`. The larger cluster lies on the positive
    side. With fewer than two different tokens the direction is drawn from `generator`.
    """
    axis = _unit(row.double())
    tokens = _unit(tokens.double())
    direction = _two_means_direction(tokens - torch.outer(tokens @ axis, axis))
    if direction is None:
        direction = torch.randn(row.numel(), generator=generator, dtype=torch.float64).to(row.device)
        direction = _unit(direction - (direction @ axis) * axis)
    return direction


def _two_means_direction(points: Tensor) -> Tensor | None:
    """From the mean of the smaller of two clusters of points [n, D] to that of the larger; None for less than two.

    Lloyd's algorithm from a deterministic start: the halves of the points along their principal direction.
    """
    if len(points) < 2:
        return None
    centred = points - points.mean(0)
    axis = centred[centred.square().sum(1).argmax()]
    for _ in range(_MAX_ROUNDS):
        axis = _unit(centred.T @ (centred @ axis))
    side = centred @ axis > 0
    difference = torch.zeros_like(axis)
    for _ in range(_MAX_ROUNDS):
        if side.all() or not side.any():
            return None
        a, b = points[side].mean(0), points[~side].mean(0)
        difference = a - b if 2 * int(side.sum()) >= len(side) else b - a
        nearer_a = (points - b).square().sum(1) > (points - a).square().sum(1)
        if torch.equal(nearer_a, side):
            break
        side = nearer_a
    return _unit(difference)


def redrawn(weight: Tensor, units: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """`weight` with the hidden units `units` [n] along `dim` drawn anew: normal, with its own mean and deviation.

    Source: Drop-Upcycling, arXiv 2502.19261.
    """
    shape = list(weight.shape)
    shape[dim] = len(units)
    noise = torch.randn(shape, generator=generator).to(weight)
    return weight.index_copy(dim, units, weight.mean() + weight.std(correction=0) * noise)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors [..., D] scaled to length 1; zero vectors stay zero."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.masked_fill(length < 1e-12, torch.inf)
