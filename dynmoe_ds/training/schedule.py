"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, final_fraction: float) -> float:
    """The rate of optimiser step `step` (from 0): linear warm-up to `peak`, then a cosine to `final_fraction * peak`.

    The first step takes peak / warmup_steps, step `warmup_steps - 1` the peak and step `total_steps - 1` the final
    rate, which later steps keep. No step has rate 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / max(1, total_steps - warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * (final_fraction + (1 - final_fraction) * cosine)
