"""The dispatch plan in two kernels: counts per block of tokens, and, after two cumulative sums, the indices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

_PAIRS_PER_BLOCK = 1024
UNUSED_PER_BLOCK = 1024


@triton.jit
def plan_count_kernel(
    mask, rows_per_block, rows_per_token, T, S, num_blocks, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):
    """rows_per_block [S, num_blocks]: pairs of each slot in each block of tokens; rows_per_token [T]."""
    block = tl.program_id(0)
    t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.arange(0, BLOCK_S)
    inside = (t[:, None] < T) & (s[None, :] < S)
    is_pair = (tl.load(mask + t[:, None] * S + s[None, :], mask=inside, other=0) != 0).to(tl.int32)
    tl.store(rows_per_token + t, tl.sum(is_pair, 1), mask=t < T)
    tl.store(rows_per_block + s.to(tl.int64) * num_blocks + block, tl.sum(is_pair, 0), mask=s < S)


@triton.jit
def plan_fill_kernel(
    mask,
    rows_up_to,
    first_row,
    token_index,
    pair_index,
    rows_per_slot,
    row_index,
    entry_index,
    T,
    S,
    num_blocks,
    num_cells,
    num_rows,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_UNUSED: tl.constexpr,
):
    """rows_up_to [S, num_blocks]: the inclusive cumulative sum of rows_per_block. Programs after num_blocks fill the
    rows that belong to no pair. Stores stay inside num_rows, and so do the values stored."""
    block = tl.program_id(0)
    if block < num_blocks:
        t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        s = tl.arange(0, BLOCK_S)
        inside = (t[:, None] < T) & (s[None, :] < S)
        pair = t[:, None] * S + s[None, :]
        is_pair = (tl.load(mask + pair, mask=inside, other=0) != 0).to(tl.int32)
        cell = s.to(tl.int64) * num_blocks + block
        before = tl.load(rows_up_to + cell - 1, mask=(s < S) & (cell > 0), other=0)
        entries_before = tl.load(first_row + t, mask=t < T, other=0)
        row = before[None, :] + tl.cumsum(is_pair, 0) - is_pair
        entry = entries_before[:, None] + tl.cumsum(is_pair, 1) - is_pair
        is_row = (is_pair != 0) & (row < num_rows)
        is_entry = (is_pair != 0) & (entry < num_rows)
        tl.store(token_index + row, tl.broadcast_to(t[:, None], (BLOCK_T, BLOCK_S)), mask=is_row)
        tl.store(pair_index + row, pair, mask=is_row)
        tl.store(entry_index + row, tl.minimum(entry, num_rows - 1), mask=is_row)
        tl.store(row_index + entry, tl.minimum(row, num_rows - 1), mask=is_entry)
        if block == 0:
            before_slot = tl.load(rows_up_to + cell - 1, mask=(s < S) & (s > 0), other=0)
            up_to_slot = tl.load(rows_up_to + cell + num_blocks - 1, mask=s < S, other=0)
            tl.store(rows_per_slot + s, up_to_slot - before_slot, mask=s < S)
    else:
        total = tl.load(rows_up_to + num_cells - 1)
        spare_row = (block - num_blocks).to(tl.int64) * BLOCK_UNUSED + tl.arange(0, BLOCK_UNUSED)
        is_spare = (spare_row >= total) & (spare_row < num_rows)
        zeros = tl.zeros((BLOCK_UNUSED,), tl.int64)
        tl.store(token_index + spare_row, zeros, mask=is_spare)
        tl.store(pair_index + spare_row, zeros, mask=is_spare)
        tl.store(entry_index + spare_row, spare_row, mask=is_spare)
        tl.store(row_index + spare_row, spare_row, mask=is_spare)


def plan_blocks(num_slots: int) -> dict[str, int]:
    """Tokens and slots of a block: all slots, and as many tokens as registers hold beside them."""
    block_s = max(triton.next_power_of_2(num_slots), 2)
    return {"BLOCK_T": max(_PAIRS_PER_BLOCK // block_s, 1), "BLOCK_S": block_s}


def launch_plan(mask: Tensor, num_rows: int | None) -> dict[str, Tensor]:
    """The fields of `PlanIndices` for mask [T, S] bool."""
    (T, S), device = mask.shape, mask.device
    if not mask.numel():
        unused = torch.arange(num_rows or 0, device=device)
        nothing, first_row, per_slot = (
            torch.zeros(n, dtype=torch.int64, device=device) for n in (len(unused), T + 1, S)
        )
        indices = {"token_index": nothing, "pair_index": nothing, "row_index": unused, "entry_index": unused}
        return {**indices, "rows_per_slot": per_slot, "first_row": first_row}
    mask = mask.contiguous().view(torch.uint8)
    blocks = plan_blocks(S)
    num_blocks = triton.cdiv(T, blocks["BLOCK_T"])
    rows_per_block = torch.empty(S * num_blocks, dtype=torch.int32, device=device)
    # The first of T + 1 stays 0, and so an inclusive sum over all of them is the exclusive one over tokens.
    rows_per_token = torch.zeros(T + 1, dtype=torch.int32, device=device)
    launch(
        plan_count_kernel, (num_blocks,), device, mask, rows_per_block, rows_per_token[1:], T, S, num_blocks, **blocks
    )
    rows_up_to = rows_per_block.cumsum(0, dtype=torch.int64)
    first_row = rows_per_token.cumsum(0, dtype=torch.int64)
    size = int(rows_up_to[-1]) if num_rows is None else num_rows
    num_unused_blocks = 0 if num_rows is None else triton.cdiv(size, UNUSED_PER_BLOCK)
    token_index, pair_index, row_index, entry_index = torch.empty(4, size, dtype=torch.int64, device=device)
    rows_per_slot = torch.empty(S, dtype=torch.int64, device=device)
    launch(
        plan_fill_kernel,
        (num_blocks + num_unused_blocks,),
        device,
        mask,
        rows_up_to,
        first_row,
        token_index,
        pair_index,
        rows_per_slot,
        row_index,
        entry_index,
        T,
        S,
        num_blocks,
        S * num_blocks,
        size,
        **blocks,
        BLOCK_UNUSED=UNUSED_PER_BLOCK,
    )
    return {
        "token_index": token_index,
        "pair_index": pair_index,
        "rows_per_slot": rows_per_slot,
        "row_index": row_index,
        "entry_index": entry_index,
        "first_row": first_row if num_rows is None else first_row.clamp(max=num_rows),
    }
