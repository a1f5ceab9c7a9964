"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    final_fraction: float,
    decay: Literal["cosine", "linear"] = "cosine",
) -> float:
    """The rate of optimiser step `step` (from 0): linear warm-up to `peak`, then a fall to `final_fraction * peak`.

    The first step takes peak / warmup_steps, step `warmup_steps - 1` the peak and step `total_steps - 1` the final
    rate, which later steps keep. Only a `final_fraction` of 0 gives a step the rate 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / max(1, total_steps - warmup_steps)
    left = 1 - min(1.0, progress)
    height = left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2
    return peak * (final_fraction + (1 - final_fraction) * height)
