import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.engine.checkpointing import non_reentrant_checkpoint
from dynmoe_ds.errors import RoutingError
from dynmoe_ds.routing.records import pack
from tests.helpers.reference import assert_near, randomise

D = 8


def make(router: str = "top_any_recommended") -> dm.MoELayer:
    layer = dm.MoELayer(hidden_size=D, ffn_hidden_size=4, num_experts=3, num_slots=4, router=router, seed=0)
    return randomise(layer)


def tokens(num_tokens: int = 20) -> Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(1))


def torch_checkpoint(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def torch_reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def deepspeed_reentrant(function, *args):
    import deepspeed

    return deepspeed.checkpointing.checkpoint(function, *args)


class Calls:
    """Counts the passes of a layer and keeps the masks of all of them."""

    def __init__(self, layer: dm.MoELayer) -> None:
        self.masks: list[Tensor] = []
        layer.router.register_forward_hook(lambda _, args, routing: self.masks.append(routing.mask))


@pytest.mark.parametrize("recompute", [torch_checkpoint, non_reentrant_checkpoint], ids=["torch", "deepspeed"])
def test_recomputation_counts_nowhere_and_changes_nothing(recompute):
    def run(layer, wrap):
        x = tokens().requires_grad_()
        with dm.StepLedger() as ledger:
            y = wrap(lambda h: layer(h).square(), x)
            loss = y.sum() + ledger.aux_loss()
            loss.backward()  # inside the block on purpose: recomputation must not count here either
            late_aux_loss = ledger.aux_loss()
        (record,) = ledger.records().values()
        gradients = [x.grad, *(p.grad for p in layer.parameters())]
        return record, [loss.detach(), late_aux_loss.detach(), *gradients]

    want_record, want = run(make(), lambda function, x: function(x))
    layer = make()
    calls = Calls(layer)
    record, got = run(layer, recompute)
    assert len(calls.masks) == 2 and torch.equal(*calls.masks)
    assert torch.equal(pack({"layer": record}), pack({"layer": want_record}))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("recompute", [torch_reentrant, deepspeed_reentrant], ids=["torch", "deepspeed"])
def test_reentrant_checkpoint_is_refused(recompute):
    layer = make()
    x = tokens().requires_grad_()
    with dm.StepLedger(), pytest.raises(RoutingError, match="A MoELayer runs inside a reentrant activation checkpoint"):
        recompute(layer, x)
    layer.name = "model.layers.1.mlp"
    with dm.StepLedger(), pytest.raises(RoutingError, match=r"^model\.layers\.1\.mlp runs .* Use torch\.utils"):
        recompute(layer, x)


def test_evaluation_counts_nowhere_and_no_ledger_is_needed():
    layer = make()
    layer(tokens())
    with dm.StepLedger() as ledger:
        layer.eval()(tokens())
    assert ledger.records() == {}
    assert float(ledger.aux_loss()) == 0.0


def test_training_mode_without_gradients_is_recorded():
    with dm.StepLedger() as ledger, torch.no_grad():
        make()(tokens())
    assert int(ledger.records()["layer_0"].num_tokens) == 20


def test_forward_passes_and_layers_add_up():
    a, b = make(), make("top_any")
    b.name = "b"
    model = nn.Sequential(a, b)
    with dm.StepLedger() as first:
        model(tokens(20))
    with dm.StepLedger() as second:
        model(tokens(7))
    with dm.StepLedger() as both:
        model(tokens(20))
        model(tokens(7))
    assert list(both.records()) == ["layer_0", "b"]
    for name, record in both.records().items():
        parts = first.records()[name], second.records()[name]
        assert torch.equal(record.tokens_per_slot, parts[0].tokens_per_slot + parts[1].tokens_per_slot)
        assert int(record.num_tokens) == 27
    assert_near(both.aux_loss(), first.aux_loss() + second.aux_loss())


def test_inner_ledger_hides_the_outer_one():
    layer = make()
    with dm.StepLedger() as outer:
        with dm.StepLedger() as inner:
            layer(tokens(3))
        layer(tokens(5))
    layer(tokens(7))
    counts = [int(ledger.records()["layer_0"].num_tokens) for ledger in (inner, outer)]
    assert counts == [3, 5]


def test_a_failed_forward_leaves_no_ledger_behind():
    layer = make()
    with pytest.raises(RoutingError), dm.StepLedger() as ledger:
        layer(torch.zeros(2, D + 1))
    layer(tokens())
    assert ledger.records() == {}


def test_router_without_losses_gives_zero():
    config = dm.TopAnyConfig(diversity_weight=0.0, simplicity_weight=0.0)
    layer = dm.MoELayer(hidden_size=D, ffn_hidden_size=4, num_experts=2, num_slots=2, router=config)
    with dm.StepLedger() as ledger:
        layer(tokens())
    assert float(ledger.aux_loss()) == 0.0 and len(ledger.records()) == 1
