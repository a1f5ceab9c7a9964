"""`engine.backward(loss)` differentiates the loss and the auxiliary losses, as one rank without an engine does."""

from __future__ import annotations

import pytest
import torch

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, batch, deepspeed_config, gathered
from tests.helpers.spawn import run_ranks


def _one_step(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    config = dm.TopAnyConfig(diversity_weight=1.0, simplicity_weight=1.0)
    plain = TinyModel(1, router=config)
    with dm.StepLedger() as ledger:
        loss = plain(*batch(0, 16))
    total = loss + ledger.aux_loss()
    total.backward()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer.step()
    engine = dm.initialize(TinyModel(1, router=config), deepspeed_config(1, kind="SGD", lr=0.1))
    returned = engine.backward(engine(*batch(0, 16)))
    engine.step()
    assert float(ledger.aux_loss()) > 1 and float(engine.last_aux_loss) == pytest.approx(float(ledger.aux_loss()))
    assert float(returned) == pytest.approx(float(total))
    expected = {name: param.detach().clone() for name, param in plain.named_parameters()}
    return {"expected": expected, "actual": gathered(engine)}


def test_auxiliary_losses_are_in_the_gradients() -> None:
    result = run_ranks(_one_step, 1)[0]
    for expert_id in range(4):
        row = result["expected"]["moe.0.router.weight"][2 * expert_id]
        torch.testing.assert_close(result["actual"][f"moe.0.router.weight[{expert_id}]"], row, rtol=0, atol=1e-6)
