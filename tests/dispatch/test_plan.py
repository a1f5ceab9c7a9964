import gc
import weakref
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from dynmoe_ds.dispatch import plan_dispatch
from dynmoe_ds.dispatch.plan import RowMoves
from dynmoe_ds.engine.activation_checkpointing import non_reentrant_checkpoint
from tests.helpers.reference import assert_near


def random_mask(num_tokens: int, num_slots: int, share: float) -> torch.Tensor:
    return torch.rand(num_tokens, num_slots, generator=torch.Generator().manual_seed(num_tokens)) < share


MASKS = {
    "uneven": random_mask(13, 5, 0.4),
    "one token": torch.tensor([[True, False, True]]),
    "no tokens": torch.zeros(0, 3, dtype=torch.bool),
    "nobody": torch.zeros(4, 3, dtype=torch.bool),
    "everybody": torch.ones(4, 3, dtype=torch.bool),
    "one expert": torch.tensor([[False, True]] * 5),
    "one slot": torch.tensor([[True], [False], [True]]),
}


@pytest.fixture(params=MASKS.values(), ids=MASKS)
def mask(request) -> torch.Tensor:
    return request.param


def pairs(mask: torch.Tensor) -> list[tuple[int, int]]:
    """(slot, token) of every row, in the order of rows."""
    return [(s, t) for s in range(mask.shape[1]) for t in range(len(mask)) if mask[t, s]]


def test_plan(mask):
    rows = pairs(mask)
    plan, told = plan_dispatch(mask, None), plan_dispatch(mask, len(rows))
    assert all(torch.equal(getattr(plan, name), getattr(told, name)) for name in plan.__slots__)
    assert plan.token_index.tolist() == [t for _, t in rows]
    assert plan.pair_index.tolist() == [t * mask.shape[1] + s for s, t in rows]
    assert plan.rows_per_slot.tolist() == [sum(s == slot for s, _ in rows) for slot in range(mask.shape[1])]
    entries = [(int(t), int(s)) for t, s in mask.nonzero()]
    assert plan.entry_index.tolist() == [entries.index((t, s)) for s, t in rows]
    by_token = [[i for i, (_, t) in enumerate(rows) if t == token] for token in range(len(mask))]
    assert plan.row_index.tolist() == [i for of_token in by_token for i in of_token]
    assert plan.first_row.tolist() == [sum(map(len, by_token[:token])) for token in range(len(mask) + 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_and_sums(mask, dtype):
    plan, rows = plan_dispatch(mask, None), pairs(mask)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(mask), 4, generator=generator).to(dtype).requires_grad_()
    gathered = RowMoves(plan).gather(hidden)
    assert gathered.dtype == dtype and gathered.shape == (len(rows), 4)
    assert all(torch.equal(gathered[i], hidden[t]) for i, (_, t) in enumerate(rows))

    values = torch.randn(len(rows), 4, generator=generator).to(dtype).requires_grad_()
    expected = torch.zeros(len(mask), 4, dtype=torch.float64)
    for i, (_, t) in enumerate(rows):
        expected[t] += values[i].detach().double()
    sums = RowMoves(plan).sum(values)
    assert_near(sums, expected)

    # The two are each other's transpose: <gather(h), v> = <h, sum(v)>.
    assert_near(torch.autograd.grad((gathered * values).sum(), hidden)[0], expected)
    (grad,) = torch.autograd.grad((sums * hidden).sum(), values)
    assert torch.equal(grad, gathered.detach())


def test_sums_of_16_bit_rows_are_accumulated_in_float32():
    moves = RowMoves(plan_dispatch(torch.ones(1, 300, dtype=torch.bool), None))
    assert moves.sum(torch.ones(300, 1, dtype=torch.bfloat16)).item() == 300  # 256 + 1 is 256 in bfloat16


def test_gradients_of_any_layout():
    plan = plan_dispatch(MASKS["uneven"], None)
    hidden = torch.randn(13, 4, requires_grad=True)
    RowMoves(plan).gather(hidden).sum().backward()  # an expanded gradient
    assert torch.equal(hidden.grad[:, 0], MASKS["uneven"].sum(1).float())
    rows = torch.randn(len(plan.token_index), 4, requires_grad=True)
    RowMoves(plan).sum(rows).sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def there_and_back(hidden: torch.Tensor) -> torch.Tensor:
    moves = RowMoves(plan_dispatch(MASKS["uneven"], None))
    return moves.sum(moves.gather(hidden).square())


def test_gradients_by_finite_differences():
    assert gradcheck(there_and_back, torch.randn(13, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("kind", ["plain", "twice", "torch", "deepspeed"])
def test_gradients_under_checkpoints_and_twice(kind):
    hidden = torch.randn(13, 2, requires_grad=True)
    want = 2 * hidden.detach() * MASKS["uneven"].sum(1, keepdim=True)
    if kind in ("plain", "twice"):
        sums = there_and_back(hidden)
    else:
        sums = {"torch": partial(checkpoint, use_reentrant=False), "deepspeed": non_reentrant_checkpoint}[kind](
            there_and_back, hidden
        )
    for _ in range(2 if kind == "twice" else 1):
        hidden.grad = None
        sums.sum().backward(retain_graph=kind == "twice")
        assert torch.allclose(hidden.grad, want)


class Upstream(torch.autograd.Function):
    """The identity, whose node keeps what it is given."""

    @staticmethod
    def forward(ctx, hidden, token):
        ctx.token = token
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_a_graph_without_a_backward_pass_is_freed_at_once():
    class Token:
        pass

    token = Token()
    alive = weakref.ref(token)
    gc.collect()
    gc.disable()
    try:
        sums = there_and_back(Upstream.apply(torch.randn(13, 2, requires_grad=True), token))
        del token
        assert alive() is not None
        del sums
        assert alive() is None
    finally:
        gc.enable()
