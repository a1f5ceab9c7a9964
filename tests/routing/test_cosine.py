"""Cosine scores against torch's own, and their hand-written gradient."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from dynmoe_ds.routing.cosine import cosine_gates, cosine_quantile, cosine_scores

gates = sys.modules["dynmoe_kernels.top_any_gates"]
HIDDEN = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROWS = F.normalize(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1)


def test_scores_are_cosines():
    expected = torch.cosine_similarity(HIDDEN[:, None], ROWS[None], dim=2)
    torch.testing.assert_close(cosine_scores(HIDDEN, ROWS), expected)


def test_open_gates_are_those_above_their_thresholds_and_active():
    threshold = torch.tensor([0.1, -0.3, -2.0], dtype=torch.float64)
    scores, is_open = cosine_gates(HIDDEN, ROWS, threshold, torch.tensor([True, True, False]))
    assert torch.equal(scores, cosine_scores(HIDDEN, ROWS))
    assert is_open.tolist() == [[s[0] > 0.1, s[1] > -0.3, False] for s in scores.tolist()]
    assert {False, True} <= set(is_open[:, :2].flatten().tolist())


def test_gradient():
    assert gradcheck(cosine_scores, (HIDDEN.clone().requires_grad_(), ROWS.clone().requires_grad_()))


def test_zero_vectors_score_zero_and_get_no_gradient():
    hidden = torch.zeros(2, 4, requires_grad=True)
    scores = cosine_scores(hidden, ROWS.float())
    scores.sum().backward()
    assert not scores.any() and not hidden.grad.any()


def test_no_tokens():
    hidden = torch.zeros(0, 4, requires_grad=True)
    cosine_scores(hidden, ROWS.float()).sum().backward()
    assert hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("values_per_part", [1, 3 * HIDDEN.shape[1], gates._VALUES_PER_PART])
def test_tokens_in_parts_and_of_a_narrower_dtype(values_per_part, monkeypatch):
    """On a CPU: as if the tokens had been widened all at once, and their gradient rounded once."""
    monkeypatch.setattr(gates, "_VALUES_PER_PART", values_per_part)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    grad = torch.randn(len(HIDDEN), len(ROWS), generator=torch.Generator().manual_seed(2))
    narrow, rows = HIDDEN.bfloat16().requires_grad_(), ROWS.float().requires_grad_()
    scores = cosine_scores(narrow, rows)
    wide, wide_rows = narrow.detach().double().requires_grad_(), rows.detach().double().requires_grad_()
    expected = wide @ wide_rows.T / wide.norm(dim=1, keepdim=True)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-6)
    scores.backward(grad)
    expected.backward(grad.double())
    assert narrow.grad.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.grad, wide.grad.bfloat16(), rtol=2**-7, atol=1e-6)  # one unit in the last place
    torch.testing.assert_close(rows.grad, wide_rows.grad.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("hidden_size", "tolerance"), [(8, 0.03), (64, 0.005), (512, 0.003)])
@pytest.mark.parametrize("share", [0.03, 0.125, 0.5, 0.8])
def test_quantile_is_passed_by_its_share_of_random_directions(share, hidden_size, tolerance):
    directions = torch.randn(100_000, hidden_size, generator=torch.Generator().manual_seed(2))
    quantile = cosine_quantile(torch.tensor(share, dtype=torch.float64), hidden_size)
    passes = cosine_scores(directions, torch.eye(1, hidden_size)) > quantile
    assert passes.double().mean().item() == pytest.approx(share, abs=tolerance)


def test_quantiles_of_nobody_and_everybody_are_cosines():
    shares = torch.tensor([0.0, 1e-9, 0.5, 1.0], dtype=torch.float64)
    for hidden_size in (1, 2, 64):
        quantiles = cosine_quantile(shares, hidden_size)
        assert quantiles.abs().max() <= 1 and quantiles[0] == quantiles[1] > 0.4
        assert quantiles[3].item() == pytest.approx(-quantiles[0].item(), rel=1e-6)
