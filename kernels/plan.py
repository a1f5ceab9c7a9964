"""The dispatch plan: from a mask to the indices that move rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu.plan import can_compute_plan, plan_cpu
from .selection import use_triton


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanIndices:
    """Where the rows of T tokens go, all int64. A row is a pair of a token and a slot that the mask holds.

    Rows are numbered by slot, and by token within a slot; entries are the same pairs numbered by token, and by slot
    within a token. token_index [N]: token of each row. pair_index [N]: token · S + slot of each row. rows_per_slot [S].
    row_index [N]: row of each entry. first_row [T + 1]: the entries of token t begin at first_row[t] and end before
    first_row[t + 1], so that row_index and first_row are a CSR over tokens. entry_index [N]: entry of each row, the
    inverse of row_index: `compact[entry_index]` brings values in the order of entries into that of rows.

    With more rows allocated than the mask holds, the remaining ones have token_index and pair_index 0, and row_index
    and entry_index of themselves. No token's entries and no slot's rows reach them, so what they contain has no effect
    on sums over tokens or slots.
    """

    token_index: Tensor
    pair_index: Tensor
    rows_per_slot: Tensor
    row_index: Tensor
    entry_index: Tensor
    first_row: Tensor


def plan(mask: Tensor, num_rows: int | None) -> PlanIndices:
    """The plan of mask [T, S] bool. No sort and no atomics.

    num_rows: rows to allocate, at least as many as the mask holds; nothing waits for the device then. None counts
    them, and waits once. With too few rows the plan is useless, but points nowhere outside of them; `rows_per_slot`
    counts all pairs in any case.
    """
    if use_triton(mask):
        from .jit.plan import launch_plan

        return PlanIndices(**launch_plan(mask, num_rows))
    if can_compute_plan(mask) and (fields := plan_cpu(mask, num_rows)) is not None:
        return PlanIndices(**fields)
    return plan_torch(mask, num_rows)


def plan_torch(mask: Tensor, num_rows: int | None) -> PlanIndices:
    """The twin of `plan`."""
    num_tokens, num_slots = mask.shape
    by_slot = mask.T.reshape(-1)
    first_row = F.pad(mask.sum(1).cumsum(0), (1, 0))
    if num_rows is None:
        flat_index = by_slot.nonzero().squeeze(1)
    else:
        flat_index = torch.nonzero_static(by_slot, size=num_rows, fill_value=0).squeeze(1)
    slot_index = flat_index.div(max(num_tokens, 1), rounding_mode="floor")
    token_index = flat_index - slot_index * num_tokens
    pair_index = token_index * num_slots + slot_index
    entries_before = F.pad(mask.reshape(-1).cumsum(0), (1, 0))  # never empty, and so can be indexed in any case
    entry_index = entries_before.index_select(0, pair_index)
    rows = torch.arange(len(flat_index), device=mask.device)
    if num_rows is not None:
        entry_index = torch.where(rows < first_row[-1], entry_index, rows).clamp_(max=num_rows - 1)
        first_row = first_row.clamp_(max=num_rows)
    return PlanIndices(
        token_index=token_index,
        pair_index=pair_index,
        rows_per_slot=mask.sum(0),
        row_index=rows.scatter(0, entry_index, rows),
        entry_index=entry_index,
        first_row=first_row,
    )
