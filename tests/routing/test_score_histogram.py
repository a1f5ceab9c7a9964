"""Histograms of scores against plain counting, and the k-th greatest score against sorting."""

import pytest
import torch

from dynmoe_ds.routing.score_histogram import GREATEST, NUM_BINS, SMALLEST, bin_edges, kth_greatest, score_histogram


def scores(num_tokens: int, num_slots: int = 3, seed: int = 0) -> torch.Tensor:
    """Of different sizes and places: about 1, about 30 with a mean of −40, and about 0.01."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_tokens, num_slots, generator=generator, dtype=torch.float64)
    return values * torch.tensor([1.0, 30.0, 0.01]) + torch.tensor([0.3, -40.0, 0.0])


def width_at(score: float) -> float:
    edges = bin_edges()
    place = int((edges <= score).sum())
    return float(edges[place] - edges[place - 1])


def test_bins_are_as_wide_as_they_say():
    edges = bin_edges()
    assert edges.shape == (NUM_BINS + 1,) and torch.all(edges.diff() > 0)
    assert edges[-1].item() == pytest.approx(GREATEST) and edges[0].item() == pytest.approx(-GREATEST)
    assert torch.equal(edges, -edges.flip(0)) and edges[NUM_BINS // 2] == 0
    assert width_at(5.0) == pytest.approx(0.033 * 5.0, rel=0.05)
    assert width_at(-300.0) == pytest.approx(0.033 * 300.0, rel=0.05)
    assert width_at(SMALLEST / 1000) == pytest.approx(3.3e-5, rel=0.02)


def test_counts_are_those_of_a_loop():
    x = scores(200)
    x[:4] = torch.tensor([[1e9, -1e9, 0.0], [GREATEST, -GREATEST, 5e-4], [torch.inf, -torch.inf, 3e4], [0.0, 0.0, 0.0]])
    counted = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    counted[:4] = True
    edges = bin_edges()
    expected = torch.zeros(3, NUM_BINS, dtype=torch.float64)
    for t in range(len(x)):
        for e in range(3):
            if counted[t, e]:
                place = int((edges <= x[t, e]).sum()) - 1
                expected[e, min(max(place, 0), NUM_BINS - 1)] += 1
    got = score_histogram(x, counted)
    assert got.dtype == torch.float64 and torch.equal(got.sum(1), counted.sum(0).double())
    assert (got - expected).abs().sum() <= 4, "no more than a score or two on an edge in the next bin"


def test_histograms_of_parts_add_up_to_that_of_the_whole():
    x, all_of_them = scores(300), torch.ones(300, 3, dtype=torch.bool)
    parts = [score_histogram(x[part], all_of_them[part]) for part in (slice(0, 7), slice(7, 290), slice(290, 300))]
    assert torch.equal(sum(parts), score_histogram(x, all_of_them))
    assert not score_histogram(x[:0], all_of_them[:0]).any()


def test_a_nan_breaks_nothing():
    x = torch.full((3, 2), torch.nan)
    assert score_histogram(x, torch.ones(3, 2, dtype=torch.bool)).sum().item() == 6


@pytest.mark.parametrize("share", [0.01, 0.125, 0.5, 0.9])
def test_the_kth_greatest_of_all_parts_is_that_of_the_whole_to_a_bins_width(share):
    whole = scores(4000)
    histogram = torch.zeros(3, NUM_BINS, dtype=torch.float64)
    for part in whole.split([1500, 1, 700, 1799]):  # as ranks and micro steps of different sizes
        histogram += score_histogram(part, torch.ones(part.shape, dtype=torch.bool))
    k = torch.full((3,), share * 4000)
    got = kth_greatest(histogram, k)
    assert got.dtype == torch.float64
    for e in range(3):
        exact = whole[:, e].sort(descending=True).values[int(share * 4000) - 1].item()
        assert abs(got[e].item() - exact) <= 1.01 * width_at(exact)
        passed = (whole[:, e] > got[e]).sum().item()
        assert passed == pytest.approx(share * 4000, rel=0.02, abs=2), "interpolation makes it far better"


def test_worked_example():
    edges = bin_edges()
    histogram = torch.zeros(2, NUM_BINS, dtype=torch.float64)
    histogram[0, [600, 620, 800]] = torch.tensor([6.0, 8.0, 2.0], dtype=torch.float64)
    histogram[1, 600] = 1.0

    def within(place: int, share_from_above: float) -> float:
        return (edges[place + 1] - share_from_above * (edges[place + 1] - edges[place])).item()

    for k, place, share in ((1.0, 800, 0.5), (2.0, 800, 1.0), (4.0, 620, 0.25), (10.0, 620, 1.0), (13.0, 600, 0.5)):
        got = kth_greatest(histogram, torch.tensor([k, 0.25]))
        assert got.tolist() == pytest.approx([within(place, share), within(600, 0.25)])
    least, none = kth_greatest(histogram, torch.tensor([99.0, 0.0])).tolist()
    assert least == pytest.approx(within(600, 1.0)) and none == pytest.approx(GREATEST)


def test_without_scores_nothing_passes():
    assert kth_greatest(torch.zeros(2, NUM_BINS), torch.tensor([3.0, 0.0])).tolist() == pytest.approx([GREATEST] * 2)
