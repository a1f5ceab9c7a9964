from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.spawn import run_ranks
from torch import Tensor, nn

import dynmoe_ds as dm
from dynmoe_ds.data import HeldOutOrder
from dynmoe_ds.training.predictions import predict


class Squares:
    """Example i is the number i; its label is i squared plus a half."""

    def __len__(self) -> int:
        return 100

    def batch(self, indices, device="cpu") -> dict[str, Tensor]:
        x = torch.tensor([float(index) for index in indices], device=device)
        return {"x": x, "labels": x.square() + 0.5}


class LinearEngine:
    """Outputs x and -x, and no loss."""

    def __init__(self) -> None:
        self.module, self.device, self.num_calls = nn.Identity(), torch.device("cpu"), 0

    def __call__(self, **batch: Tensor) -> Any:
        assert set(batch) == {"x"} and not self.module.training
        self.num_calls += 1
        return SimpleNamespace(logits=torch.stack([batch["x"], -batch["x"]], dim=1))

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


def _predict(rank: int, world_size: int) -> dict[int, Any]:
    results = {}
    for num_examples in (1, 4, 7):
        engine = LinearEngine()
        order = HeldOutOrder(num_sequences=num_examples, micro_batch_size=2, rank=rank, world_size=world_size)
        results[num_examples] = (predict(engine, Squares(), order), engine.num_calls, engine.module.training)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_example_is_predicted_once_and_in_order(world_size):
    ranks = [_predict(0, 1)] if world_size == 1 else run_ranks(_predict, world_size)
    for num_examples, (predictions, num_calls, is_training) in ranks[0].items():
        x = torch.arange(num_examples, dtype=torch.float64)
        assert torch.equal(predictions.outputs, torch.stack([x, -x], dim=1))
        assert torch.equal(predictions.labels, x.square() + 0.5)
        assert is_training, "the mode comes back"
        for other in ranks:
            assert torch.equal(other[num_examples][0].outputs, predictions.outputs)
            assert other[num_examples][1] == num_calls, "forwards are collective"


class ExpertEngine(LinearEngine):
    """Sends every example through experts, as two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.module = dm.MoELayer(hidden_size=4, ffn_hidden_size=4, num_experts=2, num_slots=2, seed=0)

    def __call__(self, **batch: Tensor) -> Any:
        return SimpleNamespace(logits=self.module(batch["x"][:, None, None].expand(-1, 2, 4)).mean(1))


def test_repeats_are_not_recorded():
    """Seven examples in batches of four: the last row is a repeat."""
    order = HeldOutOrder(num_sequences=7, micro_batch_size=4, rank=0, world_size=1)
    with dm.StepLedger(evaluation=True) as ledger:
        predict(ExpertEngine(), Squares(), order)
    assert int(ledger.records()["layer_0"].num_tokens) == 7 * 2
