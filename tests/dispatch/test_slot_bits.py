import pytest
import torch

from dynmoe_ds.dispatch.slot_bits import pack_bits, unpack_bits


@pytest.mark.parametrize("num_slots", [1, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("num_rows", [0, 1, 50])
def test_bits_come_back(num_rows, num_slots):
    mask = torch.rand(num_rows, num_slots, generator=torch.Generator().manual_seed(num_slots)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (num_rows, (num_slots + 7) // 8)
    assert torch.equal(unpack_bits(packed, num_slots), mask)


def test_which_bit_is_which_slot():
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, [0, 3, 9]] = True
    mask[1] = True
    assert pack_bits(mask).tolist() == [[1 + 8, 2], [255, 3]]
