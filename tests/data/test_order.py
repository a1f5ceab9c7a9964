from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from dynmoe_ds.data import Grouping, HeldOutOrder, TrainingOrder


def _training_order(rank=0, world_size=1, micro=4, accumulation=1, num_sequences=10, seed=3) -> TrainingOrder:
    return TrainingOrder(
        seed=seed,
        num_sequences=num_sequences,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        rank=rank,
        world_size=world_size,
    )


def _global_batch(step: int, world_size: int, micro: int, accumulation: int) -> list[int]:
    batch = []
    for rank in range(world_size):
        order = _training_order(rank, world_size, micro, accumulation)
        for micro_step in range(accumulation):
            batch += order.indices(step, micro_step)
    return sorted(batch)


@pytest.mark.parametrize("layout", [(2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2)])
def test_a_step_reads_the_same_sequences_however_they_are_dealt_out(layout):
    world_size, micro, accumulation = layout
    for step in range(12):  # crosses epochs of 10 sequences in the middle of a step
        assert _global_batch(step, world_size, micro, accumulation) == _global_batch(step, 1, 4, 1)


def test_every_sequence_is_read_once_per_epoch_and_epochs_differ():
    order = _training_order()
    line = [index for step in range(5) for index in order.indices(step, 0)]
    first, second = line[:10], line[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


@pytest.mark.parametrize("layout", [(2, 2, 1), (2, 1, 2), (1, 4, 1)])
def test_epochs_are_those_of_the_indices(layout):
    """Each epoch's examples, put together by what `epochs` says of them, are all examples once."""
    world_size, micro, accumulation = layout
    read: dict[int, list[int]] = {}
    for step in range(5):  # two epochs of 10 examples
        for rank in range(world_size):
            order = _training_order(rank, world_size, micro, accumulation)
            for micro_step in range(accumulation):
                epochs, indices = order.epochs(step, micro_step), order.indices(step, micro_step)
                for epoch, index in zip(epochs, indices, strict=True):
                    read.setdefault(epoch, []).append(index)
    assert {epoch: sorted(indices) for epoch, indices in read.items()} == {0: list(range(10)), 1: list(range(10))}


def test_a_step_needs_no_earlier_step():
    fresh, used = _training_order(), _training_order()
    for step in range(7):
        used.indices(step, 0)
    assert fresh.indices(7, 0) == used.indices(7, 0)


def test_seeds_give_different_orders():
    assert _training_order(seed=3).indices(0, 0) != _training_order(seed=4).indices(0, 0)


def test_fewer_sequences_than_a_batch_repeat_evenly():
    batch = _training_order(micro=6, num_sequences=3).indices(0, 0)
    assert sorted(batch) == [0, 0, 1, 1, 2, 2]


def test_held_out_batches_by_hand():
    """5 sequences on 2 ranks in batches of 2: rank 0 has 0 1 | 4 and a repeat, rank 1 has 2 3 | two repeats."""
    orders = [HeldOutOrder(num_sequences=5, micro_batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert list(orders[0]) == [([0, 1], [1.0, 1.0]), ([4, 0], [1.0, 0.0])]
    assert list(orders[1]) == [([2, 3], [1.0, 1.0]), ([1, 2], [0.0, 0.0])]


@pytest.mark.parametrize("num_sequences", [1, 3, 4, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_held_out_ranks_have_equal_batches_and_each_sequence_counts_once(num_sequences, world_size, micro):
    orders = [
        HeldOutOrder(num_sequences=num_sequences, micro_batch_size=micro, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(list(order)) for order in orders}) == 1
    pairs = [pair for order in orders for indices, weights in order for pair in zip(indices, weights, strict=True)]
    assert all(len(indices) == micro for order in orders for indices, _ in islice(order, 100))
    assert sorted(index for index, weight in pairs if weight == 1.0) == list(range(num_sequences))
    assert {weight for _, weight in pairs} <= {0.0, 1.0}


@pytest.mark.parametrize("layout", [(1, 4, 1), (2, 1, 2)])
def test_a_step_of_an_order_with_groups_is_of_one_kind_however_it_is_dealt_out(layout):
    world_size, micro, accumulation = layout
    kinds, lengths = np.arange(24) % 3 == 0, np.arange(24)
    grouping = Grouping(lengths=lengths, kinds=kinds)
    orders = [
        replace(_training_order(rank, world_size, micro, accumulation, num_sequences=24), grouping=grouping)
        for rank in range(world_size)
    ]
    alone = replace(_training_order(num_sequences=24), grouping=grouping)
    seen = []
    for step in range(6):
        dealt = [index for order in orders for turn in range(accumulation) for index in order.indices(step, turn)]
        assert sorted(dealt) == sorted(alone.indices(step, 0))
        assert len({bool(kinds[index]) for index in dealt}) == 1, step
        seen += dealt
    assert sorted(seen) == list(range(24)), "an epoch"


def test_the_share_of_padding_by_hand():
    """Of seven sequences three batches of two are whole, whichever rank has them; two alone are a batch."""
    lengths = np.arange(1, 8)
    order = _training_order(rank=1, world_size=2, micro=2, num_sequences=7)
    epoch = [_training_order(num_sequences=7, micro=1).indices(step, 0)[0] for step in range(7)]
    batches = [[int(lengths[i]) for i in epoch[start : start + 2]] for start in (0, 2, 4)]
    padding = sum(2 * max(batch) - sum(batch) for batch in batches)
    assert order.padding_share(lengths) == pytest.approx(padding / sum(2 * max(batch) for batch in batches))
    alike = replace(
        _training_order(micro=2, num_sequences=6), grouping=Grouping(lengths=lengths[:6], kinds=np.zeros(6))
    )
    assert alike.padding_share(lengths[:6]) == pytest.approx(3 / 24), "1 2 | 3 4 | 5 6"
    assert _training_order(micro=8, num_sequences=2).padding_share(np.array([3, 9])) == pytest.approx(1 - 12 / 18)
