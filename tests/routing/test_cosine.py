"""Cosine scores against torch's own, and their hand-written gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from dynmoe_ds.routing.cosine import cosine_quantile, cosine_scores

HIDDEN = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROWS = F.normalize(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1)


def test_scores_are_cosines():
    expected = torch.cosine_similarity(HIDDEN[:, None], ROWS[None], dim=2)
    torch.testing.assert_close(cosine_scores(HIDDEN, ROWS), expected)


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
