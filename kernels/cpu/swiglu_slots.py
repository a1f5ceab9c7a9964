"""SwiGLU experts of all slots in C++: products by torch, and the slots side by side on the threads."""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from . import build
from .torch_cpu import DTYPES, FUNCTIONS, may_compute, torch_cpu

_CACHE_LINE_BYTES = 64
_COST_OF_SHARING = 1.1
"""Of a row whose slot is shared by all threads, beside one that a thread has for itself: 1.0 to 1.05 for large slots,
1.4 for small ones, measured with 2 threads.
"""


class _Call(ctypes.Structure):
    """`Call` in swiglu_slots.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in FUNCTIONS),
        *((name, ctypes.c_int32) for name in ("dtype", "device")),
        *((name, ctypes.c_int64) for name in ("slots", "hidden", "inner")),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("first_row", "order")),
        *((name, ctypes.c_int64) for name in ("shared", "threads")),
        ("buffers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_buffers", "stride")),
        *((name, ctypes.c_void_p) for name in ("rows", "row_weights", "w1", "w3", "w2", "gate", "up", "out")),
        *((name, ctypes.c_void_p) for name in ("grad", "grad_rows", "grad_weights", "grad1", "grad3", "grad2")),
        ("error", ctypes.c_char * 256),
    )


def can_compute_swiglu_slots(rows: Tensor, row_weights: Tensor, *parameters: Tensor) -> bool:
    """Whether `swiglu_slots` can work on these tensors, and may: with `auto` alone.

    It takes contiguous rows and parameters of one dtype, float32 or bfloat16, on a CPU, and row_weights in float32.
    """
    return _are_taken(rows, row_weights, *parameters) and may_compute()


def swiglu_slots(
    rows: Tensor,
    row_weights: Tensor,
    rows_per_slot: Sequence[int],
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`row_weights[i] · w2 (silu(w1 x) * (w3 x))` [N, D] for x = rows[i], rows [N, D] sorted by slot.

    w1, w3 [s, F, D]; w2 [s, D, F]; rows after those of all slots are of none and undefined. Leaves gate and up in
    `kept` [N, F] each; None keeps them no longer than a slot takes. Touches the weights of those slots alone that have
    rows.

    Raises: RuntimeError if a product fails.
    """
    out = torch.empty_like(rows)
    gate, up = kept or (None, None)
    inputs = {"rows": rows, "row_weights": row_weights, "w1": w1, "w3": w3, "w2": w2}
    _run("swiglu_slots", 1 if kept else 3, rows_per_slot, inputs, gate=gate, up=up, out=out)
    return out


def swiglu_slots_backward(
    grad: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    rows_per_slot: Sequence[int],
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    gate: Tensor,
    up: Tensor,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows, row_weights, and those of w1, w3, w2 that are wanted; exact zeros for slots without rows.

    grad [N, D] of what `swiglu_slots` gave, contiguous; gate and up [N, F] as it kept them.

    Raises: RuntimeError if a product fails.
    """
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(row_weights)
    grad1, grad3, grad2 = (torch.empty_like(t) if want else None for t, want in zip((w1, w3, w2), wants, strict=True))
    inputs = {"rows": rows, "row_weights": row_weights, "w1": w1, "w3": w3, "w2": w2}
    gradients = {"grad_rows": grad_rows, "grad_weights": grad_weights, "grad1": grad1, "grad3": grad3, "grad2": grad2}
    _run("swiglu_slots_backward", 3, rows_per_slot, inputs, gate=gate, up=up, grad=grad, **gradients)
    return grad_rows, grad_weights, grad1, grad3, grad2


def divide(rows_per_slot: Sequence[int], threads: int) -> tuple[list[int], int]:
    """All slots, the fullest first, and how many of them, from the first, are shared by all threads.

    The others go to single threads, each to the next that is free. Of a few divisions that of the least estimated time:
    no slot shared; those that are fuller than a thread's part of what is left; these and as many that every thread gets
    equally many of the others; all.
    """
    order = sorted(range(len(rows_per_slot)), key=rows_per_slot.__getitem__, reverse=True)
    counts = [count for slot in order if (count := rows_per_slot[slot]) > 0]
    left, too_full = sum(counts), 0
    while too_full < len(counts) and counts[too_full] * threads > left:
        left -= counts[too_full]
        too_full += 1

    def estimate(shared: int) -> float:
        loads = [0] * threads
        for count in counts[shared:]:
            heapq.heapreplace(loads, loads[0] + count)
        return _COST_OF_SHARING * sum(counts[:shared]) / threads + max(loads)

    candidates = {0, too_full, too_full + (len(counts) - too_full) % threads, len(counts)}
    return order, min(sorted(candidates), key=estimate)


def _are_taken(rows: Tensor, row_weights: Tensor, *others: Tensor) -> bool:
    return (
        rows.dtype in DTYPES
        and row_weights.dtype == torch.float32
        and all(tensor.dtype == rows.dtype for tensor in others)
        and all(t.device.type == "cpu" and t.is_contiguous() for t in (rows, row_weights, *others))
    )


def _run(
    name: str, num_buffers: int, rows_per_slot: Sequence[int], inputs: dict[str, Tensor], **others: Tensor | None
) -> None:
    """Call the function of that name.

    Buffers [n, F] are for the slots that are computed at the same time. Their rows end with the cache line after F's
    last: at powers of two, products with a transposed one are 10 to 20 % slower.
    """
    rows, w1 = inputs["rows"], inputs["w1"]
    tensors = inputs | {field: tensor for field, tensor in others.items() if tensor is not None}
    _check(rows_per_slot, tensors)
    num_slots, inner, hidden = w1.shape
    threads = torch.get_num_threads()
    order, shared = divide(rows_per_slot, threads)
    at_once = max(sum(rows_per_slot[slot] for slot in part) for part in (order[:1], order[shared:][:threads]))
    line = _CACHE_LINE_BYTES // rows.element_size()
    stride = (-(-inner // line) + 1) * line
    buffers = rows.new_empty(num_buffers * at_once * stride)
    of_torch = torch_cpu()
    assert of_torch is not None
    call = _Call(
        **of_torch.functions,
        dtype=of_torch.dtypes[rows.dtype],
        device=of_torch.device,
        slots=num_slots,
        hidden=hidden,
        inner=inner,
        first_row=(ctypes.c_int64 * (num_slots + 1))(0, *accumulate(rows_per_slot)),
        order=(ctypes.c_int64 * num_slots)(*order),
        shared=shared,
        threads=threads,
        buffers=buffers.data_ptr(),
        num_buffers=num_buffers,
        stride=stride,
        **{field: tensor.data_ptr() for field, tensor in tensors.items()},
    )
    if getattr(build.library(), f"{name}_{DTYPES[rows.dtype]}")(ctypes.byref(call)) != 0:
        raise RuntimeError(f"torch could not compute an expert on the CPU: {call.error.decode(errors='replace')}")


def _check(rows_per_slot: Sequence[int], tensors: dict[str, Tensor]) -> None:
    """Bare pointers know no sizes. Raises: AssertionError."""
    (num_slots, inner, hidden), num_rows = tensors["w1"].shape, len(tensors["rows"])
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (num_rows, hidden),
        "row_weights": (num_rows,),
        "w3": (num_slots, inner, hidden),
        "w2": (num_slots, hidden, inner),
        "gate": (num_rows, inner),
        "up": (num_rows, inner),
        "grad": (num_rows, hidden),
    }
    given = {field: tensor for field, tensor in tensors.items() if field in ("w1", *shapes)}
    for field, tensor in given.items():
        assert tensor.shape == shapes.get(field, tensor.shape), (field, tensor.shape, shapes[field])
    assert _are_taken(given.pop("rows"), given.pop("row_weights"), *given.values())
    assert len(rows_per_slot) == num_slots and sum(rows_per_slot) <= num_rows and min(rows_per_slot) >= 0, rows_per_slot
