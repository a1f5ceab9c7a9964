"""Histograms of scores, which add up over micro steps and ranks, and the k-th greatest score that they tell."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_BINS = 1024
SMALLEST, GREATEST = 1e-3, 1e4
"""Bins are as wide as the scores are great from SMALLEST to GREATEST, equally wide within ±SMALLEST, and mirrored."""

_RANGE = math.asinh(GREATEST / SMALLEST)


def bin_edges(device: torch.device | None = None) -> Tensor:
    """The NUM_BINS + 1 edges of the bins in ascending order, float64.

    Equal steps of asinh(score / SMALLEST): 0.033, so that a bin is 3.3 % of its score wide, or 3.3e-5 near 0.
    """
    steps = torch.linspace(-_RANGE, _RANGE, NUM_BINS + 1, dtype=torch.float64, device=device)
    return SMALLEST * torch.sinh(steps)


@torch.no_grad()
def score_histogram(scores: Tensor, counted: Tensor) -> Tensor:
    """How many scores of each slot fall into each bin [S, NUM_BINS], float64; scores outside count in the outer bins.

    scores [T, S]; counted [T, S] bool: which of them count. Whole numbers, so that the order of adding changes nothing.
    """
    num_slots = scores.shape[1]
    place = (torch.asinh(scores / SMALLEST) / _RANGE + 1) * (NUM_BINS / 2)
    # A NaN would fall outside of all bins, and out of the histogram's memory.
    bins = place.nan_to_num().clamp(0, NUM_BINS - 1).long() + NUM_BINS * torch.arange(num_slots, device=scores.device)
    histogram = torch.zeros(num_slots * NUM_BINS, dtype=torch.float64, device=scores.device)
    return histogram.scatter_add_(0, bins.flatten(), counted.flatten().double()).view(num_slots, NUM_BINS)


@torch.no_grad()
def kth_greatest(histogram: Tensor, k: Tensor) -> Tensor:
    """The score [S] float64 that k [S] of the scores in each row of `histogram` [S, NUM_BINS] are above.

    Exact to the width of a bin, inside which scores count as evenly spread. k need not be whole; a k of 0 gives
    GREATEST, and one above the number of scores gives what they are all above.
    """
    descending = histogram.flip(1)
    above = descending.cumsum(1)
    k = k.double().minimum(above[:, -1])[:, None]
    place = (above >= k).int().argmax(1, keepdim=True)
    in_bin = descending.gather(1, place)
    share = (k - (above.gather(1, place) - in_bin)) / in_bin.clamp_min(1)
    edges = bin_edges(histogram.device).flip(0)
    return torch.lerp(edges[place], edges[place + 1], share).squeeze(1)
