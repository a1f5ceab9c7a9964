"""Which samples share a row, and what batches of such rows hold."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.test_llava import SAMPLES, load
from torch import Tensor

from dynmoe_ds.data.chat import IGNORED
from dynmoe_ds.data.packing import packed_rows


def sums(rows: tuple[tuple[int, ...], ...], lengths: list[int]) -> list[list[int]]:
    return [[lengths[i] for i in row] for row in rows]


def test_best_fit_with_the_longest_first_by_hand() -> None:
    """The 3 goes to the 7, where it fits best, and not to the 5; of two 4 one fills a row, the other begins one."""
    lengths = [5, 3, 9, 7]
    assert sums(packed_rows(lengths, [0] * 4, capacity=10, seed=0), lengths) == [[9], [7, 3], [5]]
    lengths = [5, 3, 9, 6, 4, 5, 4]
    assert sums(packed_rows(lengths, [0] * 7, capacity=10, seed=0), lengths) == [[9], [6, 4], [5, 5], [4, 3]]
    assert sums(packed_rows([10, 10, 1], [0] * 3, 10, 0), [10, 10, 1]) == [[10], [10], [1]]
    assert packed_rows([], [], 10, 0) == ()


def by_looking_at_every_row(lengths: list[int], capacity: int) -> list[int]:
    """The room that best fit leaves in its rows, by a loop over all of them for each sample."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(left) if room >= length]
        if fitting:
            left[min(fitting, key=left.__getitem__)] -= length
        else:
            left.append(capacity - length)
    return left


@pytest.mark.parametrize("num_samples", [1, 2, 50, 700])
@pytest.mark.parametrize("capacity", [64, 2048])
def test_every_sample_is_there_once_in_few_rows_of_one_kind(num_samples: int, capacity: int) -> None:
    rng = np.random.default_rng(num_samples)
    lengths = np.minimum(rng.geometric(8 / capacity, num_samples), capacity).tolist()
    kinds = (rng.random(num_samples) < 0.3).tolist()
    rows = packed_rows(lengths, kinds, capacity, seed=1)
    assert sorted(sample for row in rows for sample in row) == list(range(num_samples))
    assert all(sum(row) <= capacity for row in sums(rows, lengths))
    assert all(len({kinds[sample] for sample in row}) == 1 for row in rows)
    of_kind = [[length for length, kind in zip(lengths, kinds, strict=True) if kind == wanted] for wanted in (0, 1)]
    room = [left for part in of_kind for left in by_looking_at_every_row(part, capacity)]
    assert sorted(capacity - sum(row) for row in sums(rows, lengths)) == sorted(room)


def test_rows_are_the_seeds() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    found = [packed_rows(lengths, np.zeros(200), 64, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_a_packed_batch_is_its_samples_end_to_end(folder: Path) -> None:
    samples = load(folder, [*SAMPLES, *SAMPLES]).train
    examples = dataclasses.replace(samples, rows=((2, 1), (0,), (1, 3, 4)))
    assert [examples.length(i) for i in range(3)] == [
        sum(samples.length(i) for i in row) for row in examples.rows or ()
    ]
    batch = examples.batch([2, 0, 1])
    length = max(examples.length(i) for i in (2, 0, 1))
    pictures = []
    for number, row in enumerate([(1, 3, 4), (2, 1), (0,)]):
        one_by_one = [samples.batch([i]) for i in row]
        for name in ("input_ids", "labels", "token_kinds"):
            together = torch.cat([one[name][0] for one in one_by_one])
            assert torch.equal(batch[name][number, : len(together)], together), name
        places = [place for one in one_by_one for place in range(one["input_ids"].shape[1])]
        assert batch["packed_positions"][number].tolist() == [*places, *range(length - len(places))]
        assert batch["attention_mask"][number].tolist() == [place < len(places) for place in range(length)]
        first = batch["packed_positions"][number] == 0
        assert (batch["labels"][number][first] == IGNORED).all(), "learned from the sample before"
        pictures += [one["pixel_values"] for one, i in zip(one_by_one, row, strict=True) if samples.samples[i].images]
    assert torch.equal(batch["pixel_values"], torch.cat(pictures))
    assert "packed_positions" not in samples.batch([0, 1])


def test_the_first_token_is_learned_nowhere(folder: Path) -> None:
    """Of an answer that nothing precedes: the template has neither a question nor a first token."""
    answer = {"id": "said", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "one two"}]}
    (sample,) = load(folder, [answer], template="plain").train.samples
    assert sample.labels.tolist() == [IGNORED, *sample.ids[1:].tolist()]


def test_rows_with_and_without_images_stay_apart_on_request(folder: Path) -> None:
    samples = load(folder, [*SAMPLES, SAMPLES[1]]).train
    apart = samples.packed(2 * samples.length(2), 0, is_grouped=True)
    assert apart.rows is not None and sorted(map(set, apart.rows), key=min) == [{0, 2}, {1, 3}]
    assert dict(zip(apart.grouping().kinds.tolist(), apart.grouping().lengths.tolist(), strict=True)) == {
        True: samples.length(0) + samples.length(2),
        False: 2 * samples.length(1),
    }
    together = samples.packed(sum(samples.length(i) for i in range(4)), 0, is_grouped=False)
    assert len(together) == 1 and together.grouping().kinds.tolist() == [True]


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


def test_an_image_that_cannot_be_decoded_leaves_its_row(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = SAMPLES[0] | {"id": "bad", "image": "broken.png"}
    samples = load(folder, [bad, *SAMPLES], on_broken="skip").train
    examples = dataclasses.replace(samples, rows=((1, 0, 2), (0,), (3,)))
    with caplog.at_level(logging.ERROR):
        found = examples.batch([0, 1])
    assert caplog.text.count("Sample bad is left out") == 2
    without = dataclasses.replace(samples, rows=((1, 2), (3,)))
    assert same(found, without.batch([0, 1])), "nothing was left of the second row, so the third took its place"
