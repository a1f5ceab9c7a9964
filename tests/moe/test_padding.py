import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.errors import RoutingError
from dynmoe_ds.moe import PaddingMask
from tests.helpers.reference import randomise

D, B, L = 8, 3, 5


class Decoder(nn.Module):
    """Passes hidden states alone to its layer, as decoders of Hugging Face do."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        layer = dm.MoELayer(
            hidden_size=D, ffn_hidden_size=4, num_experts=3, num_slots=4, router="top_any_recommended", seed=0
        )
        self.moe = randomise(layer)
        self.recompute = recompute
        self.padding = self.moe.padding = PaddingMask()
        self.handle = self.padding.watch(self)
        self.masks: list[Tensor] = []
        self.moe.router.register_forward_hook(lambda _, args, routing: self.masks.append(routing.mask))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, flat: bool = False) -> Tensor:
        x = x.reshape(-1, D) if flat else x
        return checkpoint(self.moe, x, use_reentrant=False) if self.recompute else self.moe(x)


def hidden(seed: int = 1) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def left_padding(*lengths: int) -> Tensor:
    return torch.stack([(torch.arange(L) >= L - n).long() for n in lengths])


MASK, OTHER_MASK = left_padding(5, 2, 3), left_padding(1, 5, 4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_attention_mask_is_the_token_mask(dtype):
    model = Decoder()
    with dm.StepLedger() as ledger:
        y = model(hidden(), attention_mask=MASK.to(dtype))
    assert torch.equal(y, model.moe(hidden(), token_mask=MASK.bool()))
    assert int(ledger.records()["layer_0"].num_tokens) == 10
    assert not y[MASK == 0].any()


def test_explicit_token_mask_wins():
    model = Decoder()
    model(hidden(), attention_mask=MASK)
    assert torch.equal(model.moe(hidden(), token_mask=OTHER_MASK.bool()), model(hidden(), attention_mask=OTHER_MASK))


@pytest.mark.parametrize("mask", [None, torch.ones(B, 1, L, L)], ids=["none", "4-dimensional"])
def test_mask_ends_with_the_next_forward(mask):
    model = Decoder()
    model(hidden(), attention_mask=MASK)
    assert torch.equal(model(hidden(), attention_mask=mask), Decoder()(hidden()))


def test_unwatched_model_has_no_padding():
    model = Decoder()
    model.handle.remove()
    assert torch.equal(model(hidden(), attention_mask=MASK), Decoder()(hidden()))


@pytest.mark.parametrize("mask", [MASK, None], ids=["padding", "no padding"])
def test_recomputation_sees_the_same_padding(mask):
    model, plain = Decoder(recompute=True), Decoder()
    for m in (model, plain):
        m(hidden(), attention_mask=mask).square().sum().backward()
        m.padding.backward_done()
    first, second = model.masks
    assert torch.equal(first, second)
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("masks", [(MASK, OTHER_MASK), (MASK, None), (None, MASK)], ids=["two", "first", "second"])
def test_recomputing_one_of_two_open_forward_passes_is_refused(masks):
    model = Decoder(recompute=True)
    losses = [model(hidden(), attention_mask=mask).sum() for mask in masks]
    with pytest.raises(RoutingError, match="a forward pass that others with different padding have followed"):
        sum(losses).backward()


def test_evaluation_between_forward_and_backward_is_refused():
    model = Decoder(recompute=True)
    loss = model(hidden(), attention_mask=MASK).sum()
    with torch.no_grad():
        model.eval()(hidden(), attention_mask=OTHER_MASK)
    model.train()
    with pytest.raises(RoutingError, match="different padding"):
        loss.backward()


def test_several_forward_passes_are_fine_where_padding_is_known():
    same = Decoder(recompute=True)
    (same(hidden(1), attention_mask=MASK).sum() + same(hidden(2), attention_mask=MASK).sum()).backward()

    plain = Decoder(recompute=False)
    (plain(hidden(1), attention_mask=MASK).sum() + plain(hidden(2), attention_mask=OTHER_MASK).sum()).backward()

    one_by_one = Decoder(recompute=True)
    for mask in (MASK, None, OTHER_MASK):
        one_by_one(hidden(), attention_mask=mask).sum().backward()
        one_by_one.padding.backward_done()

    evaluated = Decoder(recompute=True)
    with torch.no_grad():
        evaluated.eval()(hidden(), attention_mask=MASK)
    evaluated.train()(hidden(), attention_mask=OTHER_MASK).sum().backward()

    for recomputed in (same, one_by_one, evaluated):
        assert recomputed.moe.experts.w1.grad.any()
    stored = Decoder(recompute=False)
    (stored(hidden(1), attention_mask=MASK).sum() + stored(hidden(2), attention_mask=MASK).sum()).backward()
    torch.testing.assert_close(same.moe.experts.w1.grad, stored.moe.experts.w1.grad)
    assert not torch.allclose(plain.moe.experts.w1.grad, stored.moe.experts.w1.grad), "the masks make no difference"


def test_attention_mask_by_position_counts_too():
    model = Decoder()
    assert torch.equal(model(hidden(), MASK), model.moe(hidden(), token_mask=MASK.bool()))


def test_mask_of_a_cached_prefix_is_cut_to_the_new_tokens():
    model, mask, last = Decoder().eval(), left_padding(5, 1, 3), hidden()[:, -2:]
    y = model(last, attention_mask=mask)
    assert torch.equal(y, model.moe(last, token_mask=mask[:, -2:].bool()))
    assert not y[1, 0].any() and y[1, 1].any()


def test_mask_of_another_shape_is_reported_once(caplog):
    model = Decoder()
    plain = Decoder()(hidden(), flat=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(model(hidden(), attention_mask=MASK, flat=True), plain)
    (message,) = caplog.messages
    start = "The model got an attention_mask of shape (3, 5) but a MoELayer sees tokens of shape (15,)"
    assert message.startswith(start)
    assert message.endswith("Pass token_mask to the layer.")


@pytest.mark.parametrize(
    ("mask", "form"),
    [
        (torch.ones(B, 1, L, L), "shape (3, 1, 5, 5)"),
        ({"full_attention": MASK}, "type dict"),
    ],
    ids=["4-dimensional", "one per kind of attention"],
)
def test_mask_that_does_not_tell_padding_is_no_padding_and_said_once(mask, form, caplog):
    model = Decoder()
    with caplog.at_level(logging.WARNING), dm.StepLedger() as ledger:
        for _ in range(2):
            assert torch.equal(model(hidden(), attention_mask=mask), Decoder()(hidden()))
    assert int(ledger.records()["layer_0"].num_tokens) == 2 * B * L
    assert caplog.messages == [
        f"The model got an attention_mask of {form}, which does not say which tokens are padding: all are routed and "
        "counted as real. If there is padding, pass a mask of shape [B, L], or token_mask to the layer."
    ]


def test_no_mask_and_a_fitting_one_are_not_worth_a_word(caplog):
    model = Decoder()
    with caplog.at_level(logging.WARNING):
        model(hidden(), attention_mask=MASK)
        model(hidden())
    assert caplog.messages == []
