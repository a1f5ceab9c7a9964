"""What every launch needs: a device, a grid that is not empty, and the width of a block."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

MAX_WARPS = 4


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` over `grid` on `device`, unless the grid is empty."""
    if all(grid):
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **constants)


def warp_size() -> int:
    """Lanes of a warp: 64 on AMD's Instinct, 32 on NVIDIA's GPUs."""
    return 32 if torch.version.hip is None else 64


def along_a_row(width: int, element_size: int, lanes: int) -> tuple[int, int]:
    """(columns of a block, warps) to go along a row of `width` elements with accesses of 16 bytes per lane."""
    per_warp = lanes * 16 // element_size
    block = min(triton.next_power_of_2(max(width, 1)), MAX_WARPS * per_warp)
    return block, max(block // per_warp, 1)


def check_shapes(**tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Kernels read through bare pointers: a tensor of another shape must not get that far."""
    for name, (tensor, shape) in tensors.items():
        assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)}, not {shape}"
