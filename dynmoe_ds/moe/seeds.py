"""The seed of a layer from the seed of its model."""

from __future__ import annotations

import numpy as np


def layer_seed(seed: int, layer_index: int) -> int:
    """One seed per layer, so that layers differ and models of neighbouring seeds share none."""
    return int(np.random.SeedSequence([seed, layer_index]).generate_state(1)[0])
