"""Which slot a row belongs to, inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot_of_row(row, slot_ends, S, BLOCK_S: tl.constexpr):
    """The number of slots that end before `row`; the last slot for rows after all ends."""
    s = tl.arange(0, BLOCK_S)
    has_ended = (tl.load(slot_ends + s, mask=s < S, other=0) <= row) & (s < S)
    return tl.minimum(tl.sum(has_ended.to(tl.int32), 0), S - 1).to(tl.int64)


def slot_block(num_slots: int) -> int:
    """The slots that `slot_of_row` looks at, all of them."""
    return max(triton.next_power_of_2(num_slots), 2)
