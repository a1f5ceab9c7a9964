"""Which slots a row is for, one bit per slot: what travels with the row."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Bytes [P, ceil(s / 8)] uint8 of mask [P, s] bool: slot 8 b + i is bit i of byte b."""
    num_rows, num_slots = mask.shape
    num_bytes = -(-num_slots // 8)
    padded = mask.new_zeros(num_rows, num_bytes * 8, dtype=torch.uint8)
    padded[:, :num_slots] = mask
    bits = padded.view(num_rows, num_bytes, 8) << _bit_numbers(mask.device)
    return bits.sum(2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, num_slots: int) -> Tensor:
    """The mask [P, s] bool of `pack_bits`."""
    bits = (packed[:, :, None] >> _bit_numbers(packed.device)) & 1
    return bits.flatten(1)[:, :num_slots].bool()


def _bit_numbers(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
