"""Cosine scores against torch's own, and their hand-written gradient."""

import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from dynmoe_ds.routing.cosine import cosine_scores

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
