"""The arithmetic of a split against worked examples, and against loops in float64 that share no code with it."""

import math

import pytest
import torch
from torch import Tensor

from dynmoe_ds.adaptation.splitting import redrawn, split_direction, split_rows

D = 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def two_clouds(sizes: tuple[int, int], noise: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [n, D] of any length around two directions, those directions, and a gate row between them."""
    a, b = torch.tensor([[1.0, 1, 0, 0, 0, 0], [1.0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    clouds = torch.cat([a + noise * random(sizes[0], D, seed=0), b + noise * random(sizes[1], D, seed=1)])
    return clouds * (1 + 9 * random(sum(sizes), 1, seed=2).abs()), a, b


def reference_direction(tokens: Tensor, row: Tensor) -> Tensor:
    """The best of all two-means solutions: every assignment of a few points is tried."""
    points = []
    for token in tokens:
        x = token / math.sqrt(sum(v * v for v in token.tolist()))
        points.append(x - (x @ row) / (row @ row) * row)
    best, direction = math.inf, None
    for code in range(1, 2 ** (len(points) - 1)):
        left = [x for i, x in enumerate(points) if code >> i & 1]
        right = [x for i, x in enumerate(points) if not code >> i & 1]
        means = [sum(part) / len(part) for part in (left, right)]
        cost = sum(float((x - m) @ (x - m)) for part, m in zip((left, right), means, strict=True) for x in part)
        if cost < best:
            best = cost
            sign = 1 if len(left) >= len(right) else -1
            direction = sign * (means[0] - means[1])
    return direction / math.sqrt(direction @ direction)


def test_rows_part_at_right_angles_and_keep_their_length():
    row, direction = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.8, 0.0, -0.6])
    # |w| = 5 and E = 0.75: w ± 3.75 u has length 6.25, so the rows are (w ± 3.75 u) / 1.25.
    expected = torch.tensor([[4.8, 0.0, 1.4], [0.0, 0.0, 5.0]])
    torch.testing.assert_close(split_rows(row, direction, 0.75), expected)
    for separation in (0.0, 0.3, 1.0, 5.0):
        rows = split_rows(random(D), split_direction(random(0, D), random(D), generator(9)), separation)
        assert torch.linalg.vector_norm(rows, dim=1).tolist() == pytest.approx([float(random(D).norm())] * 2)
        cosine = torch.cosine_similarity(rows[0], rows[1], dim=0)
        assert float(cosine) == pytest.approx((1 - separation**2) / (1 + separation**2), abs=1e-12)


def test_row_of_zeros_stays_zero():
    row = torch.zeros(D, dtype=torch.float64)
    assert not split_rows(row, split_direction(random(5, D), row, generator()), 1.0).any()


@pytest.mark.parametrize("sizes", [(40, 25), (25, 40), (200, 3)])
def test_direction_joins_two_obvious_clusters_and_points_to_the_larger(sizes):
    tokens, a, b = two_clouds(sizes)
    row = a / a.norm() + b / b.norm()
    direction = split_direction(tokens[torch.randperm(len(tokens), generator=generator())], row, generator())
    expected = (a - b) / (a - b).norm() * (1 if sizes[0] > sizes[1] else -1)
    assert float(direction @ expected) > 0.99
    assert float(direction @ row) == pytest.approx(0.0, abs=1e-12)
    assert float(direction.norm()) == pytest.approx(1.0)


def test_direction_equals_the_best_two_means_of_a_few_points():
    tokens, a, b = two_clouds((5, 4), noise=0.1)
    row = (a + b) * 7
    torch.testing.assert_close(split_direction(tokens, row, generator()), reference_direction(tokens, row))


def test_length_of_tokens_and_row_does_not_matter():
    tokens, a, b = two_clouds((9, 6))
    want = split_direction(tokens, a + b, generator())
    scale = random(len(tokens), 1).abs() + 0.1
    torch.testing.assert_close(split_direction(tokens * scale, (a + b) * 1e-3, generator()), want)


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(0, D), torch.ones(1, D), torch.ones(7, D), torch.zeros(4, D)],
    ids=["none", "one", "equal ones", "zeros"],
)
def test_without_two_clusters_the_direction_is_drawn(tokens):
    row = random(D)
    first, again, other = (split_direction(tokens, row, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for direction in (first, other):
        assert float(direction.norm()) == pytest.approx(1.0)
        assert float(direction @ row) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("dim", [1, 2])
def test_redrawn_units_have_the_statistics_of_the_whole_and_the_rest_is_kept(dim):
    weight = (3 + 0.5 * random(1, 60, 80)).float()
    units = torch.tensor([7, 0, 30, 31, 59])
    got = redrawn(weight, units, dim, generator())
    others = torch.tensor([i for i in range(weight.shape[dim]) if i not in units.tolist()])
    assert torch.equal(got.index_select(dim, others), weight.index_select(dim, others))
    new = got.index_select(dim, units)
    assert float(new.mean()) == pytest.approx(3.0, abs=0.1) and float(new.std()) == pytest.approx(0.5, rel=0.15)
    assert float((new - weight.index_select(dim, units)).abs().min()) > 0
    assert torch.equal(got, redrawn(weight, units, dim, generator()))
