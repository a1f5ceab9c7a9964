"""The dispatch plan in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import build
from .torch_cpu import may_compute, torch_cpu

_PAIRS_PER_PART = 1 << 15  # at least, chosen or not: fewer are done before another thread has begun


class _Call(ctypes.Structure):
    """`PlanCall` in plan.cpp."""

    _fields_ = (
        ("parallel_for", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "slots", "parts")),
        *((name, ctypes.c_void_p) for name in ("mask", "counts", "token_index", "pair_index")),
        *((name, ctypes.c_void_p) for name in ("row_index", "entry_index", "first_row")),
    )


def can_compute_plan(mask: Tensor) -> bool:
    """Whether `plan_cpu` can work on this mask, and may: with `auto` alone. It takes a contiguous one on a CPU."""
    return mask.device.type == "cpu" and mask.is_contiguous() and may_compute()


def plan_cpu(mask: Tensor, num_rows: int | None) -> dict[str, Tensor] | None:
    """The fields of the plan of mask [T, S] bool; None if it holds another number of pairs than `num_rows`.

    Raises: RuntimeError if torch's threads fail.
    """
    assert mask.dtype == torch.bool and mask.is_contiguous()
    num_tokens, num_slots = mask.shape
    parts = min(torch.get_num_threads(), mask.numel() // _PAIRS_PER_PART) or 1
    of_torch = torch_cpu()
    assert of_torch is not None
    counts = torch.empty(parts, num_slots, dtype=torch.int64)
    call = _Call(
        parallel_for=of_torch.functions["parallel_for"],
        tokens=num_tokens,
        slots=num_slots,
        parts=parts,
        mask=mask.data_ptr(),
        counts=counts.data_ptr(),
    )
    _run("plan_count", call)
    rows_per_slot = counts[0] if parts == 1 else counts.sum(0)
    num_pairs = int(rows_per_slot.sum())
    if num_rows not in (None, num_pairs):
        return None
    sizes = dict.fromkeys(("token_index", "pair_index", "row_index", "entry_index"), num_pairs)
    indices = {}
    for name, size in (sizes | {"first_row": num_tokens + 1}).items():
        indices[name] = torch.empty(size, dtype=torch.int64)
        setattr(call, name, indices[name].data_ptr())
    _run("plan_fill", call)
    return {"rows_per_slot": rows_per_slot, **indices}


def _run(name: str, call: _Call) -> None:
    if getattr(build.library(), name)(ctypes.byref(call)) != 0:
        raise RuntimeError("torch could not compute a dispatch plan on the CPU.")
