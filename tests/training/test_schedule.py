import pytest

from dynmoe_ds.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),  # warm-up: (step + 1) / 4
        (1, 0.50),
        (3, 1.00),
        (4, 0.1 + 0.9 * (1 + 0.8660254037844387) / 2),  # cos(30 degrees): 1 of 6 falling steps
        (6, 0.55),  # cos(90 degrees): half-way between 1 and 0.1
        (7, 0.1 + 0.9 * 0.25),  # cos(120 degrees) = -0.5
        (9, 0.10),  # the last step
        (50, 0.10),
    ],
)
def test_values_by_hand(step, expected):
    rate = learning_rate(step, peak=2.0, warmup_steps=4, total_steps=10, final_fraction=0.1)
    assert rate == pytest.approx(2.0 * expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.5), (3, 1.0), (4, 0.85), (6, 0.55), (9, 0.1), (50, 0.1)])
def test_a_linear_fall_by_hand(step, expected):
    """Warm-up as above, then sixths of the way from 1 to 0.1."""
    rate = learning_rate(step, peak=2.0, warmup_steps=4, total_steps=10, final_fraction=0.1, decay="linear")
    assert rate == pytest.approx(2.0 * expected, rel=1e-12)


def test_without_warm_up_the_rate_only_falls():
    rates = [learning_rate(step, peak=1.0, warmup_steps=0, total_steps=8, final_fraction=0.0) for step in range(8)]
    assert rates == sorted(rates, reverse=True)
    assert 0.9 < rates[0] < 1.0
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_final_fraction_one_keeps_the_peak():
    assert {learning_rate(s, peak=3.0, warmup_steps=1, total_steps=5, final_fraction=1.0) for s in range(5)} == {3.0}


def test_warm_up_longer_than_the_run_never_passes_its_line():
    assert learning_rate(4, peak=1.0, warmup_steps=10, total_steps=5, final_fraction=0.1) == 0.5
