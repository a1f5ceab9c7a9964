import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.engine.activation_checkpointing import non_reentrant_checkpoint
from dynmoe_ds.errors import RoutingError
from dynmoe_ds.moe import labelled
from dynmoe_ds.routing.records import pack
from dynmoe_ds.routing.token_kinds import mean_k_per_kind
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


def test_auxiliary_losses_of_layers_are_summed():
    """And not averaged: a weight in the configuration is per layer, however many there are."""
    a, b = make(), make("top_k")
    b.name = "b"
    with dm.StepLedger() as of_a:
        hidden = a(tokens())
    with dm.StepLedger() as of_b:
        b(hidden)
    with dm.StepLedger() as whole:
        nn.Sequential(a, b)(tokens())
    parts = [ledger.aux_loss().item() for ledger in (of_a, of_b)]
    assert min(parts) > 0 and parts[0] != pytest.approx(parts[1], rel=0.01)
    assert whole.aux_loss().item() == pytest.approx(sum(parts), rel=1e-6)


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


def kinds(num_tokens: int = 20) -> Tensor:
    return torch.arange(num_tokens) % 3 - 1


def mean_k_by_loop(masks: list[Tensor], labels: list[Tensor], kind: int) -> float:
    chosen = [
        int(mask[t].sum())
        for mask, kinds in zip(masks, labels, strict=True)
        for t in range(len(mask))
        if kinds[t] == kind
    ]
    return sum(chosen) / len(chosen)


def test_evaluation_is_recorded_where_it_is_asked_for():
    layer = make().eval()
    calls = Calls(layer)
    with dm.StepLedger(evaluation=True, token_kinds=kinds(), num_kinds=2) as ledger, torch.no_grad():
        layer(tokens())
        layer(tokens())
    record = ledger.records()["layer_0"]
    assert int(record.num_tokens) == 40
    assert torch.equal(record.tokens_per_slot, sum(mask.sum(0) for mask in calls.masks))
    assert mean_k_per_kind(record) == [mean_k_by_loop(calls.masks, [kinds()] * 2, kind) for kind in (0, 1)]
    assert float(ledger.aux_loss()) == 0.0


def test_labels_of_a_forward_pass_come_before_those_of_the_ledger():
    layer = make()
    calls = Calls(layer)
    with dm.StepLedger(token_kinds=kinds(), num_kinds=2) as ledger:
        layer(tokens())
        with labelled(kinds=torch.zeros(20, dtype=torch.int64)):
            layer(tokens())
        layer(tokens())
    (record,) = ledger.records().values()
    labels = [kinds(), torch.zeros(20), kinds()]
    assert mean_k_per_kind(record) == [mean_k_by_loop(calls.masks, labels, kind) for kind in (0, 1)]


@pytest.mark.parametrize("recompute", [torch_checkpoint, non_reentrant_checkpoint], ids=["torch", "deepspeed"])
def test_recomputation_counts_in_no_kind(recompute):
    layer = make()
    calls = Calls(layer)
    with dm.StepLedger(evaluation=True, token_kinds=kinds(), num_kinds=2) as ledger:
        recompute(layer, tokens().requires_grad_()).sum().backward()
    assert len(calls.masks) == 2
    (record,) = ledger.records().values()
    assert record.statistics["tokens_per_kind"].tolist() == [7.0, 6.0]


def test_padding_is_of_no_kind_and_shapes_are_those_of_the_batch():
    layer = make()
    real = torch.arange(20).view(4, 5) % 5 < 3
    labels = kinds().view(4, 5)
    with dm.StepLedger(token_kinds=labels, num_kinds=2) as ledger:
        layer(tokens().view(4, 5, D), token_mask=real)
        layer(tokens())  # flattened
    (record,) = ledger.records().values()
    expected = [int(((labels == kind) & real).sum()) + int((labels == kind).sum()) for kind in (0, 1)]
    assert record.statistics["tokens_per_kind"].tolist() == expected
    with dm.StepLedger(token_kinds=labels.T, num_kinds=2) as ledger:
        layer(tokens().view(4, 5, D))
    with pytest.raises(RoutingError, match="had another shape than the tokens in 1 forward passes"):
        mean_k_per_kind(ledger.records()["layer_0"])


def test_sequences_that_do_not_count_are_left_out_of_everything_but_the_output():
    layer = make("top_any").eval()
    with torch.no_grad():
        layer.router.threshold.add_(0.3)  # so that some tokens choose nobody
    x, labels, counts = tokens().view(4, 5, D), kinds().view(4, 5), torch.tensor([True, False, True, False])
    real = torch.arange(20).view(4, 5) % 5 < 3
    with dm.StepLedger(evaluation=True, token_kinds=labels, num_kinds=2) as ledger, labelled(is_counted=counts):
        y = layer(x)
        layer(x, token_mask=real)
    with dm.StepLedger(evaluation=True, token_kinds=labels[counts], num_kinds=2) as expected:
        layer(x[counts])
        layer(x[counts], token_mask=real[counts])
    got, want = (ledger.records()["layer_0"] for ledger in (ledger, expected))
    assert_near(pack({"a": got}), pack({"a": want}))
    assert int(got.num_tokens) == 2 * 5 + 2 * 3 and int(got.num_unrouted) > 0
    assert torch.equal(y, layer(x))


def test_sequences_that_cannot_be_those_of_the_tokens_are_refused():
    refused = pytest.raises(RoutingError, match="is_counted has 3 sequences, but a layer sees 20 tokens")
    with refused, dm.StepLedger(), labelled(is_counted=torch.ones(3, dtype=torch.bool)):
        make()(tokens())
