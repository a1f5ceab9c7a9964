"""An order of training in which a step's examples are of one kind and of like lengths, so that little is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BATCHES_SORTED_TOGETHER = 32
"""Lengths are compared among so many steps' worth of examples: more gives less padding, and less random batches."""


def grouped_order(
    lengths: Sequence[int] | np.ndarray, kinds: Sequence[int] | np.ndarray, step_size: int, seed: int, epoch: int
) -> np.ndarray:
    """The order [n] of one epoch, a function of its arguments alone.

    lengths, kinds: of every example, such as its tokens and whether it has an image. step_size: examples of an
    optimiser step over all ranks. Epochs follow each other without a gap, so a step may begin in one and end in the
    next: only steps inside an epoch have one kind, all but those that what is left of every kind fills up.
    """
    rng = np.random.default_rng([seed, epoch])
    of_length, of_kind = np.asarray(lengths), np.asarray(kinds)
    num_examples = len(of_length)
    steps: list[np.ndarray] = []
    rest: list[int] = []
    for kind in np.unique(of_kind):
        mine = rng.permutation(np.flatnonzero(of_kind == kind))
        for start in range(0, len(mine), BATCHES_SORTED_TOGETHER * step_size):
            near = mine[start : start + BATCHES_SORTED_TOGETHER * step_size]
            near = near[np.argsort(of_length[near], kind="stable")]
            whole = len(near) // step_size * step_size
            steps += np.split(near[:whole], whole // step_size) if whole else []
            rest += near[whole:].tolist()
    steps = [steps[i] for i in rng.permutation(len(steps))]
    # What the step that began in the epoch before still needs.
    head = min(-epoch * num_examples % step_size, num_examples)
    while len(rest) < head:
        rest += steps.pop().tolist()
    rest = rng.permutation(rest).astype(int).tolist()
    first, rest = rest[:head], rest[head:]
    while len(rest) >= step_size:
        steps.insert(int(rng.integers(len(steps) + 1)), np.array(rest[:step_size]))
        rest = rest[step_size:]
    return np.concatenate([np.array(first, int), *steps, np.array(rest, int)])
