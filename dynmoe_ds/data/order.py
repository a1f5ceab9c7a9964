"""Which rank reads which sequence when: pure functions of the step, so that any step can be resumed on any ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dynmoe_ds.data.grouping import grouped_order


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grouping:
    """What decides which sequences stand in a step together: `lengths` and `kinds` [n], see `grouped_order`."""

    lengths: np.ndarray
    kinds: np.ndarray


@lru_cache(maxsize=2)  # a step touches one epoch, or two where they meet
def _order(seed: int, epoch: int, num_sequences: int, grouping: Grouping | None, step_size: int) -> np.ndarray:
    """The order [num_sequences] of one epoch."""
    if grouping is not None:
        return grouped_order(grouping.lengths, grouping.kinds, step_size, seed, epoch)
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOrder:
    """The training sequences of one rank, by step.

    All epochs, each shuffled on its own, form one endless line, and step n reads the n-th stretch of it, of
    `micro_batch_size * gradient_accumulation_steps * world_size` sequences. So a step reads the same sequences however
    the stretch is dealt out, and each sequence is read once per epoch. grouping: None for a plain shuffle.
    """

    seed: int
    num_sequences: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    rank: int
    world_size: int
    grouping: Grouping | None = None

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimiser step, over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    def indices(self, step: int, micro_step: int) -> list[int]:
        """The `micro_batch_size` sequences that this rank reads in a micro step; both counts begin at 0."""
        return [self._at(position) for position in self._positions(step, micro_step)]

    def epochs(self, step: int, micro_step: int) -> list[int]:
        """The epochs, from 0, that the sequences of `indices` belong to."""
        return [position // self.num_sequences for position in self._positions(step, micro_step)]

    def padding_share(self, lengths: np.ndarray) -> float:
        """The share of padding in the first epoch's batches of all ranks, each as long as its longest sequence.

        lengths: of every sequence, in tokens.
        """
        line = lengths[_order(self.seed, 0, self.num_sequences, self.grouping, self.global_batch_size)]
        size = min(self.micro_batch_size, len(line))
        batches = line[: len(line) // size * size].reshape(-1, size)
        return 1 - float(batches.sum() / (batches.max(axis=1).sum() * size))

    def _positions(self, step: int, micro_step: int) -> range:
        """The stretch of the line of all epochs that this rank reads in a micro step."""
        assert 0 <= micro_step < self.gradient_accumulation_steps, (micro_step, self.gradient_accumulation_steps)
        turn = micro_step * self.world_size + self.rank
        first = step * self.global_batch_size + turn * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_sequences)
        order = _order(self.seed, epoch, self.num_sequences, self.grouping, self.global_batch_size)
        return int(order[place])


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutOrder:
    """The held-out sequences of one rank, with the same number of equal batches on every rank.

    Forwards of a model with expert parallelism or ZeRO-3 are collective, so no rank may stop earlier than another:
    the last batches are filled with repeats of weight 0.
    """

    num_sequences: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[tuple[list[int], list[float]]]:
        """Batches of (sequence indices, weights 1.0 or 0.0), both of length `micro_batch_size`."""
        stride = self.micro_batch_size * self.world_size
        for start in range(self.rank * self.micro_batch_size, self._padded(stride), stride):
            positions = range(start, start + self.micro_batch_size)
            yield ([p % self.num_sequences for p in positions], [float(p < self.num_sequences) for p in positions])

    def _padded(self, stride: int) -> int:
        return -(-self.num_sequences // stride) * stride
