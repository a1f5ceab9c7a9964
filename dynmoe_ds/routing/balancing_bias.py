"""Loss-free load balancing: a bias per slot that moves choices from busy experts to idle ones, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe_ds.routing.router import Router

SELECTION_BIAS = "selection_bias"


def add_selection_bias(router: Router) -> None:
    """Give `router` a buffer `selection_bias` [S] of zeros that follows experts from slot to slot.

    The router adds it to its scores where it chooses, never where it weighs, and moves it with `move_selection_bias`.
    """
    router.register_buffer(SELECTION_BIAS, torch.zeros(router.weight.shape[0]))
    router.slot_buffers = (*router.slot_buffers, SELECTION_BIAS)


@torch.no_grad()
def move_selection_bias(bias: Tensor, tokens_per_slot: Tensor, active: Tensor, speed: float) -> None:
    """`b ← b + speed · sign(mean load − load)` for the live slots `active` [S] bool, in place.

    bias [S]. tokens_per_slot [S]: loads of one optimiser step, summed over all data-parallel ranks.
    Source: arXiv 2408.15664, algorithm 1; there loads are those of one batch, here of all its micro steps.
    """
    load = tokens_per_slot.double()
    mean = torch.where(active, load, 0.0).sum() / active.sum()
    bias += torch.where(active, speed * torch.sign(mean - load), 0.0).to(bias.dtype)


def bias_faults(speed: float) -> list[str]:
    """What is wrong with a router's `bias_update_speed`."""
    return [] if speed >= 0 else [f"router.bias_update_speed is {speed} but must not be negative."]
