"""Evaluation and generation on several ranks, whose forwards need not be collective to show what is collective here."""

from types import SimpleNamespace

import pytest
import torch
from tests.helpers.spawn import run_ranks
from torch import nn

from dynmoe_ds.data import HeldOutOrder, TokenSequences
from dynmoe_ds.training.evaluation import held_out_loss
from dynmoe_ds.training.generation import generate

VOCAB_SIZE, LENGTH = 13, 5


class BigramEngine:
    """Logits that depend on the last token alone."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
        self.module, self.device = nn.Identity(), torch.device("cpu")
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids, logits_to_keep=0):
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:])

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


def _held_out(num_sequences: int) -> TokenSequences:
    generator = torch.Generator().manual_seed(1)
    return TokenSequences(torch.randint(VOCAB_SIZE, (num_sequences, LENGTH), generator=generator))


def _on_rank(rank: int, world_size: int) -> dict:
    losses, shapes = {}, {}
    for num_sequences in (1, 4, 7):
        engine = BigramEngine(seed=0)
        order = HeldOutOrder(num_sequences=num_sequences, micro_batch_size=2, rank=rank, world_size=world_size)
        losses[num_sequences] = held_out_loss(engine, _held_out(num_sequences), order)
        shapes[num_sequences] = engine.shapes
    different = BigramEngine(seed=rank)  # as if the ranks' numbers had drifted apart
    texts = [
        generate(different, [1], num_tokens=8, context_length=4, temperature=t, seed=3, stop_token=-1)
        for t in (0.0, 1.0)
    ]
    return {"losses": losses, "shapes": shapes, "texts": texts}


def test_two_ranks_evaluate_as_one_and_generate_what_rank_0_chooses():
    first, second = run_ranks(_on_rank, 2)
    alone = _on_rank(0, 1)
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-9)
    assert first["shapes"] == second["shapes"]
    assert first["texts"] == second["texts"] == alone["texts"]
