import pytest
import torch
from torch import Tensor

import dynmoe_ds as dm
from dynmoe_ds.moe import TokenSampler
from tests.helpers.spawn import run_ranks

D, SLOTS = 4, 3


def layer() -> dm.MoELayer:
    return dm.MoELayer(hidden_size=D, ffn_hidden_size=2, num_experts=2, num_slots=SLOTS, seed=0)


def numbered(first: int, stop: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens that say which they are: number n is the vector (n, n, ...), and goes to slot n mod S."""
    numbers = torch.arange(first, stop)
    mask = torch.nn.functional.one_hot(numbers % SLOTS, SLOTS).bool()
    return numbers[:, None].expand(-1, D).to(dtype), mask


def kept(sampler: TokenSampler, of: dm.MoELayer) -> list[int]:
    """The numbers of the kept tokens; checks that each still goes with its mask."""
    hidden, mask = sampler.gather(of)
    numbers = hidden[:, 0].long()
    assert hidden.dtype == torch.float32 and (hidden == numbers[:, None]).all()
    assert torch.equal(mask, torch.nn.functional.one_hot(numbers % SLOTS, SLOTS).bool())
    return sorted(numbers.tolist())


def test_all_tokens_are_kept_while_there_is_room():
    sampler, a = TokenSampler(10), layer()
    for first, stop in ((0, 4), (4, 4), (4, 10)):
        sampler.add(a, *numbered(first, stop), None)
    assert kept(sampler, a) == list(range(10))


def test_sample_is_bounded_and_evenly_spread_over_micro_steps_and_positions():
    sampler, a = TokenSampler(64), layer()
    for first in range(0, 1024, 128):
        sampler.add(a, *numbered(first, first + 128, torch.bfloat16 if first < 256 else torch.float32), None)
    numbers = kept(sampler, a)
    assert len(set(numbers)) == 64
    for period in (128, 32):  # of micro steps, and of positions in sequences of 32
        parts = torch.tensor([n // 128 if period == 128 else n % 32 // 4 for n in numbers]).bincount(minlength=8)
        assert parts.min() >= 6 and parts.max() <= 10, parts
    again = TokenSampler(64)
    for first in range(0, 1024, 128):
        again.add(a, *numbered(first, first + 128), None)
    assert kept(again, a) == numbers


def test_padding_is_left_out():
    sampler, a = TokenSampler(5), layer()
    real = torch.tensor([True, False] * 10)
    sampler.add(a, *numbered(0, 20), real)
    assert len(kept(sampler, a)) == 5 and all(n % 2 == 0 for n in kept(sampler, a))
    sampler.clear()
    sampler.add(a, *numbered(0, 20), torch.arange(20) < 3)
    sampler.add(a, *numbered(20, 22), torch.zeros(2, dtype=torch.bool))
    assert kept(sampler, a) == [0, 1, 2]


def test_layers_have_samples_of_their_own_and_clearing_forgets_them():
    sampler, a, b = TokenSampler(5), layer(), layer()
    sampler.add(a, *numbered(0, 2), None)
    assert kept(sampler, a) == [0, 1] and kept(sampler, b) == []
    sampler.clear()
    assert kept(sampler, a) == []


def test_tokens_that_are_not_finite_are_left_out():
    sampler, a = TokenSampler(9), layer()
    hidden, mask = numbered(0, 4)
    hidden = hidden.clone()
    hidden[1, 2], hidden[2, 0] = torch.nan, torch.inf
    sampler.add(a, hidden, mask, None)
    assert kept(sampler, a) == [0, 3]


@pytest.mark.parametrize("how", ["training", "evaluation", "padding"])
def test_ledger_hands_the_tokens_of_training_to_the_sampler(how):
    sampler, a = TokenSampler(50), layer()
    with torch.no_grad():
        a.router.threshold[:2] = torch.tensor([-2.0, 2.0])  # slot 0 takes everything, slot 1 nothing
    x = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = how != "padding"
    with dm.StepLedger(sampler=sampler):
        a.train(how != "evaluation")(x, mask)
    hidden, went = sampler.gather(a)
    expected = x[mask] if how != "evaluation" else torch.zeros(0, D)
    assert torch.equal(hidden.sort(0).values, expected.sort(0).values)
    assert went[:, 0].all() and not went[:, 1].any()


def _on_ranks(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    sampler, a = TokenSampler(6), layer()
    if rank != 1:  # a rank that has seen no token takes part all the same
        sampler.add(a, *numbered(100 * rank, 100 * rank + 4 * (rank + 1)), None)
    return sampler.gather(a)


def test_all_ranks_get_the_tokens_of_all_ranks():
    results = run_ranks(_on_ranks, 3)
    for hidden, mask in results:
        assert torch.equal(hidden, results[0][0]) and torch.equal(mask, results[0][1])
    numbers = results[0][0][:, 0].tolist()
    assert sorted(numbers[:4]) == [0, 1, 2, 3]
    assert len(set(numbers[4:])) == 6 and all(200 <= n < 212 for n in numbers[4:])
