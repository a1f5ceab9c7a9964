"""Steps of one kind and of like lengths."""

from __future__ import annotations

import numpy as np
import pytest

from dynmoe_ds.data.grouping import grouped_order

STEP = 8


def examples(num_examples: int) -> tuple[list[int], list[int]]:
    """Lengths, and kinds of which 0 is rare."""
    rng = np.random.default_rng(0)
    return rng.integers(10, 1000, num_examples).tolist(), (rng.random(num_examples) < 0.7).astype(int).tolist()


def whole_steps(order: np.ndarray, epoch: int) -> list[np.ndarray]:
    """The steps that lie inside the epoch, where all epochs form one line."""
    head = -epoch * len(order) % STEP
    inside = order[head:]
    return [inside[start : start + STEP] for start in range(0, len(inside) - STEP + 1, STEP)]


@pytest.mark.parametrize("num_examples", [0, 1, 7, 8, 9, 100, 1003])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_example_is_there_once_and_almost_every_step_is_of_one_kind(num_examples: int, epoch: int) -> None:
    lengths, kinds = examples(num_examples)
    order = grouped_order(lengths, kinds, STEP, 3, epoch)
    assert sorted(order.tolist()) == list(range(num_examples))
    mixed = [step for step in whole_steps(order, epoch) if len({kinds[i] for i in step}) > 1]
    # At most what is left of the two kinds, two stretches of less than a step, and what fills the step before.
    assert len(mixed) <= 2


def test_lengths_of_a_step_are_alike_and_steps_are_in_no_order() -> None:
    lengths, kinds = examples(1000)
    order = grouped_order(lengths, kinds, STEP, 3, 0)
    steps = [[lengths[i] for i in step] for step in whole_steps(order, 0)]
    padding = sum(max(step) * STEP - sum(step) for step in steps) / sum(lengths)
    shuffled = np.random.default_rng(1).permutation(lengths)[: len(steps) * STEP].reshape(-1, STEP)
    unsorted = (shuffled.max(1) * STEP - shuffled.sum(1)).sum() / shuffled.sum()
    assert padding < 0.1 < 0.5 < unsorted
    means = np.array([np.mean(step) for step in steps])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths, kinds = examples(100)
    orders = [grouped_order(lengths, kinds, STEP, *key).tolist() for key in ((3, 0), (3, 0), (3, 1), (4, 0))]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]
