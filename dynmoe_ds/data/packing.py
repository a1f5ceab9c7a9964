"""Several samples in one row of tokens: which go together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def packed_rows(
    lengths: Sequence[int] | np.ndarray, kinds: Sequence[int] | np.ndarray, capacity: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Which samples share a row of at most `capacity` tokens; every sample is in one row, whole.

    lengths: of every sample, at most `capacity`. kinds: a row holds samples of one kind. Best fit, the longest first:
    each sample goes to the fullest row that still has room for it, or begins another; among samples of one length
    chance decides. It is a function of its arguments alone and the same in every epoch, so that all ranks know all
    rows, and how many an epoch has, before training.
    Source: the best-fit-decreasing packing of arXiv 2404.10830, which also cuts documents; nothing is cut here.
    """
    rng = np.random.default_rng(seed)
    of_length, of_kind = np.asarray(lengths), np.asarray(kinds)
    assert of_length.size == 0 or of_length.max() <= capacity, (of_length.max(), capacity)
    rows: list[list[int]] = []
    for kind in np.unique(of_kind):
        shuffled = rng.permutation(np.flatnonzero(of_kind == kind))
        longest_first = shuffled[np.argsort(-of_length[shuffled], kind="stable")]
        by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # the rows that have so much room left
        rooms = 0  # bit r is set if by_room[r] holds a row: the best fit of 100,000s of samples in about a second
        for sample in longest_first.tolist():
            length = int(of_length[sample])
            if fitting := rooms >> length:
                room = length + (fitting & -fitting).bit_length() - 1
                row = by_room[room].pop()
                rooms ^= (not by_room[room]) << room
            else:
                room, row = capacity, []
                rows.append(row)
            row.append(sample)
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return tuple(map(tuple, rows))
