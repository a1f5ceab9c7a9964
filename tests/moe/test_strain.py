"""The strain of a ledger's records against the sum written out."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.engine.activation_checkpointing import non_reentrant_checkpoint
from dynmoe_ds.moe.ledger import STRAIN
from dynmoe_ds.routing.records import pack, unpack
from tests.helpers.reference import assert_near, randomise

D = 8

WRAPS = {
    "plain": lambda function, x: function(x),
    "torch checkpoint": lambda function, x: checkpoint(function, x, use_reentrant=False),
    "deepspeed checkpoint": non_reentrant_checkpoint,
}


def make() -> dm.MoELayer:
    layer = dm.MoELayer(
        hidden_size=D, ffn_hidden_size=4, num_experts=3, num_slots=4, router="top_any_recommended", seed=0
    )
    return randomise(layer)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def criterion(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, D)).square().mean()


def expected(layer: dm.MoELayer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ weight x length of the output's gradient, token by token; the output is a leaf of its own here."""
    y = layer(x, mask).detach().requires_grad_()
    criterion(y).backward()
    real = None if mask is None else mask.reshape(-1)
    flat = x.reshape(-1, D)
    flat = flat if real is None else torch.where(real[:, None], flat, 0.0)
    weights = layer.router(flat, layer.active, real).weights
    strain = [0.0] * layer.num_slots
    for gradient, row in zip(y.grad.reshape(-1, D).tolist(), weights.tolist(), strict=True):
        for slot, weight in enumerate(row):
            strain[slot] += weight * math.sqrt(sum(g * g for g in gradient))
    return torch.tensor(strain, dtype=torch.float64)


@pytest.mark.parametrize("wrap", WRAPS)
def test_strain_is_the_sum_of_weight_and_gradient_length(wrap):
    layer, first, second = make(), tokens(20), tokens(2, 5, seed=2)
    with dm.StepLedger(with_strain=True) as ledger:
        for x in (first, second):
            criterion(WRAPS[wrap](layer, x.requires_grad_())).backward()
        (record,) = ledger.records().values()
    want = expected(layer, first) + expected(layer, second)
    assert record.statistics[STRAIN].dtype == torch.float64
    assert_near(record.statistics[STRAIN], want, torch.float32)
    assert want[layer.active].min() > 0 and not record.statistics[STRAIN][~layer.active].any()


def test_padding_has_no_strain():
    layer, x = make(), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    with dm.StepLedger(with_strain=True) as ledger:
        criterion(layer(x, mask)).backward()
    (record,) = ledger.records().values()
    assert_near(record.statistics[STRAIN], expected(layer, x, mask), torch.float32)
    x[:, 4:] = 99.0
    with dm.StepLedger(with_strain=True) as other:
        criterion(layer(x, mask)).backward()
    assert torch.equal(other.records()["layer_0"].statistics[STRAIN], record.statistics[STRAIN])


def test_strain_of_16_bit_gradients_is_summed_in_float32():
    layer, x = make().bfloat16(), tokens(400)
    with dm.StepLedger(with_strain=True) as ledger:
        criterion(layer(x.bfloat16())).backward()
    (record,) = ledger.records().values()
    want = expected(layer, x.bfloat16())
    assert float((record.statistics[STRAIN] / want)[layer.active].sub(1).abs().max()) < 1e-5


def test_without_a_backward_pass_there_is_no_strain_yet():
    layer = make()
    with dm.StepLedger(with_strain=True) as ledger:
        loss = criterion(layer(tokens(5)))
    before = ledger.records()["layer_0"].statistics[STRAIN]
    loss.backward()
    assert not before.any() and ledger.records()["layer_0"].statistics[STRAIN].any()
    with dm.StepLedger(with_strain=True) as ledger, torch.no_grad():
        layer(tokens(5))
    assert not ledger.records()["layer_0"].statistics[STRAIN].any()


def test_no_tokens_no_strain():
    layer = make()
    with dm.StepLedger(with_strain=True) as ledger:
        layer(tokens(0).requires_grad_()).sum().backward()
    assert ledger.records()["layer_0"].statistics[STRAIN].tolist() == [0.0] * 4


def test_strain_is_only_there_when_asked_for_and_survives_packing():
    layer = make()
    with dm.StepLedger() as ledger:
        criterion(layer(tokens(5))).backward()
    assert STRAIN not in ledger.records()["layer_0"].statistics
    with dm.StepLedger(with_strain=True) as ledger:
        criterion(layer(tokens(5))).backward()
    records = ledger.records()
    again = unpack(pack(records), records)
    assert torch.equal(again["layer_0"].statistics[STRAIN], records["layer_0"].statistics[STRAIN])
