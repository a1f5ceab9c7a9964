"""Durations as sbatch reads them; the examples are of its manual page."""

from __future__ import annotations

import math

import pytest

from dynmoe_ds.launching.slurm_time import seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60), ("90:30", 90 * 60 + 30), ("24:00:00", 86400), ("1:02:03", 3723), ("2-0", 2 * 86400),
        ("2-12", 2.5 * 86400), ("1-01:30", 86400 + 5400), ("1-01:30:15", 86400 + 5415), ("unlimited", math.inf),
        ("INFINITE", math.inf),
    ],
)  # fmt: skip
def test_every_form(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "24h", "1:2:3:4", "1-2:3:4:5", "-5", "1d", "0", "0:00", "12:00:", " 5"])
def test_what_slurm_cannot_read_or_would_read_as_no_limit(text: str) -> None:
    assert seconds_of(text) is None
