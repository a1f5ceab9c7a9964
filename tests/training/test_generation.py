from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynmoe_ds.training.generation import generate

VOCAB_SIZE, STOP = 7, 6


class CountingEngine:
    """Always finds the successor of the last token likeliest, and notes what it was shown."""

    def __init__(self, sharpness: float) -> None:
        self.module, self.device, self.sharpness = nn.Identity(), torch.device("cpu"), sharpness
        self.contexts: list[list[int]] = []

    def __call__(self, input_ids, logits_to_keep):
        assert logits_to_keep == 1
        assert not self.module.training
        self.contexts.append(input_ids[0].tolist())
        logits = nn.functional.one_hot((input_ids[:, -1:] + 1) % VOCAB_SIZE, VOCAB_SIZE) * self.sharpness
        return SimpleNamespace(logits=logits)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


def _generate(engine, **changes) -> list[int]:
    arguments = {"num_tokens": 4, "context_length": 3, "temperature": 0.0, "seed": 0, "stop_token": STOP}
    return generate(engine, changes.pop("prompt", [0]), **{**arguments, **changes})


def test_greedy_counts_on_within_a_sliding_context():
    engine = CountingEngine(1.0)
    assert _generate(engine) == [0, 1, 2, 3, 4]
    assert engine.contexts == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    assert engine.module.training


def test_the_stop_token_ends_the_text():
    assert _generate(CountingEngine(1.0), prompt=[4], num_tokens=10) == [4, 5, STOP]


def test_a_seed_gives_one_text_and_seeds_differ():
    texts = [_generate(CountingEngine(0.1), temperature=1.0, num_tokens=30, seed=s, stop_token=-1) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _generate(CountingEngine(0.1), temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_follows_the_softmax():
    """Two tokens with logits 0 and ln 4 at temperature 1: the second comes four times in five."""

    class TwoTokens(CountingEngine):
        def __call__(self, input_ids, logits_to_keep):
            return SimpleNamespace(logits=torch.tensor([[[1.0, 4.0]]]).log())

    ids = _generate(TwoTokens(1.0), temperature=1.0, num_tokens=2_000, stop_token=-1)
    assert sum(ids) / len(ids) == pytest.approx(0.8, abs=0.03)
