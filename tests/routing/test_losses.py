"""The auxiliary losses against worked examples; the whole layer's losses are compared in tests/moe/test_layer.py."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from dynmoe_ds.routing import losses

# Two live rows at 60 degrees, of lengths 2 and 3, and a free slot that must not matter.
WEIGHT = torch.tensor([[2.0, 0.0], [50.0, 60.0], [1.5, 1.5 * 3**0.5]], dtype=torch.float64)
ACTIVE = torch.tensor([True, False, True])
# Four tokens: one expert, two experts, nobody, one expert.
GATES = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.float64)


def test_unit_rows():
    rows = losses.unit_rows(WEIGHT, ACTIVE)
    torch.testing.assert_close(rows, torch.tensor([[1, 0], [0, 0], [0.5, 3**0.5 / 2]], dtype=torch.float64))


def test_zero_rows_stay_zero_without_a_gradient():
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    rows = losses.unit_rows(weight, torch.tensor([True, True]))
    assert rows.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]
    rows.sum().backward()
    assert not weight.grad[0].any() and weight.grad[1].any()


def test_diversity():
    # The Gram matrix is [[1, 1/2], [1/2, 1]]; less the identity, its Frobenius norm is sqrt(2 · 1/4).
    value = losses.diversity(losses.unit_rows(WEIGHT, ACTIVE), ACTIVE)
    assert value.item() == pytest.approx(math.sqrt(0.5), abs=1e-12)
    assert losses.diversity(torch.eye(3), torch.ones(3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_has_no_diversity_and_no_gradient(dtype: torch.dtype):
    """Rows that were just made: at right angles, and of length 1, but for rounding."""
    rows = torch.linalg.qr(torch.randn(300, 20, dtype=dtype, generator=torch.Generator().manual_seed(0)))[0].T
    rows, all_live = rows.contiguous().requires_grad_(), torch.ones(20, dtype=torch.bool)
    assert (rows @ rows.T - torch.eye(20, dtype=dtype)).any(), "there is rounding"
    value = losses.diversity(rows, all_live)
    value.backward()
    assert value.item() == 0 and not rows.grad.any()
    apart = (rows.detach() + 1e-4 * rows.detach().roll(1, 0)).requires_grad_()
    losses.diversity(apart, all_live).backward()
    assert apart.grad.norm() > 0.1


def test_simplicity():
    assert losses.simplicity(WEIGHT, ACTIVE).item() == pytest.approx((2 + 3) / 2)


def test_load_balance():
    # Three tokens have an expert. me = (1 + 1/2, 1/2 + 1) / 3 = (1/2, 1/2), ce = (2/3, 2/3), K = 2:
    # K² · mean(me · ce) = 4 · 1/3.
    assert losses.load_balance(GATES, ACTIVE).item() == pytest.approx(4 / 3, abs=1e-12)
    assert losses.load_balance(torch.zeros(4, 3), ACTIVE).item() == 0
    assert losses.load_balance(torch.zeros(0, 3), ACTIVE).item() == 0


def test_load_balance_is_least_for_even_loads():
    even, skewed = torch.eye(4), torch.eye(4)[[0, 0, 0, 1]]
    live = torch.ones(4, dtype=torch.bool)
    assert losses.load_balance(even, live).item() == pytest.approx(1.0)
    assert losses.load_balance(skewed, live).item() == pytest.approx(4 * (9 + 1) / 16)


def test_load_balance_holds_k_constant_and_leaves_out_tokens_without_an_expert():
    gates = GATES.clone().requires_grad_()
    losses.load_balance(gates, ACTIVE).backward()
    # d/dg(t, e) of K Σ_e me_e ce_e is K (ce_e / (k_t n) + me_e / n), with K = 2, n = 3, me = 1/2 and ce = 2/3.
    by_k = {1: 2 * (2 / 3 + 1 / 2) / 3, 2: 2 * (2 / 6 + 1 / 2) / 3}
    # Free slot: me = ce = 0, so no gradient.
    expected = [[by_k[1], 0, by_k[1]], [by_k[2], 0, by_k[2]], [0, 0, 0], [by_k[1], 0, by_k[1]]]
    torch.testing.assert_close(gates.grad, torch.tensor(expected, dtype=torch.float64))


def test_load_balance_through_shares_has_the_same_value_and_only_moves_load():
    gates, live = GATES[:, [0, 2]].clone(), torch.ones(2, dtype=torch.bool)
    assert losses.load_balance(gates, live, through_shares=True) == losses.load_balance(gates, live)
    gates = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    losses.load_balance(gates, live, through_shares=True).backward()
    # ce = (1, 2/3). For a token of two, d/dg_e of K Σ ce_e g_e / (g_0 + g_1) / 3 is K (ce_e − mean ce) / (2 · 3), or
    # ±1/18: the busy gate closes as much as the idle one opens. In a token of one only the idle gate opens.
    expected = torch.tensor([[1 / 18, -1 / 18], [0, -2 / 9], [1 / 18, -1 / 18], [0, 0]])
    torch.testing.assert_close(gates.grad, expected)


def test_mean_open():
    assert losses.mean_open(GATES, 4).item() == 1.0
    assert losses.mean_open(GATES, torch.tensor(2)).item() == 2.0
    assert losses.mean_open(torch.zeros(0, 3), 0).item() == 0


def test_gradients_of_the_smooth_losses():
    weight = WEIGHT.clone().requires_grad_()
    assert gradcheck(lambda w: losses.diversity(losses.unit_rows(w, ACTIVE), ACTIVE), weight)
    assert gradcheck(lambda w: losses.simplicity(w, ACTIVE), weight)
    assert gradcheck(lambda v: v / losses.divisors(v), weight)
