"""SwiGLU experts of all slots in C++: products by torch, and the slots side by side on the threads."""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ..selection import chosen_kernels
from .build import library

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_TORCH_FUNCTIONS = {
    "create": "aoti_torch_create_tensor_from_blob",
    "destroy": "aoti_torch_delete_tensor_object",
    "mm_out": "aoti_torch_cpu_mm_out",
    "addmm_out": "aoti_torch_cpu_addmm_out",
}
_CACHE_LINE_BYTES = 64
_WORST_BALANCE = 1.1
"""The fullest thread over the mean, above which slots are shared: what sharing cost, in the products that it slows."""


def can_compute_swiglu_slots(rows: Tensor, row_weights: Tensor, *parameters: Tensor) -> bool:
    """Whether `swiglu_slots` can work on these tensors, and may: with `auto` alone.

    It takes contiguous rows and parameters of one dtype, float32 or bfloat16, on a CPU, and row_weights in float32. It
    must not under a `TorchDispatchMode`, such as torch's counter of FLOPs, which would not see the products.
    """
    return (
        rows.dtype in _DTYPES
        and row_weights.dtype == torch.float32
        and all(tensor.dtype == rows.dtype for tensor in parameters)
        and all(t.device.type == "cpu" and t.is_contiguous() for t in (rows, row_weights, *parameters))
        and chosen_kernels() == "auto"
        and torch._C._len_torch_dispatch_stack() == 0
        and library() is not None
        and _torch_functions() is not None
    )


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
    call = _Call.of(rows, row_weights, rows_per_slot, w1, w3, w2, *(kept or (None, None)))
    call.run("swiglu_slots", 1 if kept else 3, out=out)
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
    gradients = {"grad_rows": grad_rows, "grad_weights": grad_weights, "grad1": grad1, "grad3": grad3, "grad2": grad2}
    call = _Call.of(rows, row_weights, rows_per_slot, w1, w3, w2, gate, up)
    call.run("swiglu_slots_backward", 3, grad=grad, **gradients)
    return grad_rows, grad_weights, grad1, grad3, grad2


class _Call(ctypes.Structure):
    """`Call` in swiglu_slots.cpp. It holds addresses: whoever makes one keeps the tensors."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TORCH_FUNCTIONS),
        *((name, ctypes.c_int32) for name in ("dtype", "device")),
        *((name, ctypes.c_int64) for name in ("slots", "hidden", "inner")),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("first_row", "order")),
        *((name, ctypes.c_int64) for name in ("together", "threads")),
        *((name, ctypes.c_void_p) for name in ("rows", "row_weights", "w1", "w3", "w2", "gate", "up", "buffers")),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("out", "grad", "grad_rows", "grad_weights", "grad1", "grad3", "grad2")),
    )

    @classmethod
    def of(
        cls,
        rows: Tensor,
        row_weights: Tensor,
        rows_per_slot: Sequence[int],
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        gate: Tensor | None,
        up: Tensor | None,
    ) -> _Call:
        """What both passes need."""
        num_slots, inner, hidden = w1.shape
        threads = torch.get_num_threads()
        order, together = divide(rows_per_slot, threads)
        torch_functions = _torch_functions()
        assert torch_functions is not None
        call = cls(
            **torch_functions,
            dtype=_codes()[rows.dtype],
            device=_codes()["cpu"],
            slots=num_slots,
            hidden=hidden,
            inner=inner,
            first_row=(ctypes.c_int64 * (num_slots + 1))(0, *accumulate(rows_per_slot)),
            order=(ctypes.c_int64 * num_slots)(*order),
            together=together,
            threads=threads,
            stride=inner + _CACHE_LINE_BYTES // rows.element_size(),
        )
        call._point_to(rows=rows, row_weights=row_weights, w1=w1, w3=w3, w2=w2, gate=gate, up=up)
        call._like = rows
        call._most_rows = max(sum(rows_per_slot[e] for e in part) for part in (order[:1], order[together:][:threads]))
        return call

    def run(self, name: str, buffers_per_slot: int, **tensors: Tensor | None) -> None:
        """Call the function of that name. Raises: RuntimeError if a product fails.

        Buffers [n, F] are for the slots that are computed at the same time. Their rows are a cache line longer than F:
        at powers of two, products with a transposed one are 10 to 20 % slower.
        """
        buffers = self._like.new_empty(buffers_per_slot * self._most_rows * self.stride)
        self._point_to(buffers=buffers, **tensors)
        if getattr(library(), f"{name}_{_DTYPES[self._like.dtype]}")(ctypes.byref(self)) != 0:
            raise RuntimeError("torch could not multiply the matrices of an expert on the CPU: stderr has the reason.")

    def _point_to(self, **tensors: Tensor | None) -> None:
        for field, tensor in tensors.items():
            setattr(self, field, None if tensor is None else tensor.data_ptr())


def divide(rows_per_slot: Sequence[int], threads: int) -> tuple[list[int], int]:
    """All slots, the fullest first, and how many of them, from the first, are computed by all threads together.

    The others go to single threads, each to the next that is free. As few as possible are shared: as soon as the rest
    is divided evenly enough, no more.
    """
    order = sorted(range(len(rows_per_slot)), key=rows_per_slot.__getitem__, reverse=True)
    left = sum(rows_per_slot)
    for together, slot in enumerate(order):
        most = _WORST_BALANCE * left / threads
        if rows_per_slot[slot] <= most:
            loads = [0] * threads
            for other in order[together:]:
                heapq.heapreplace(loads, loads[0] + rows_per_slot[other])
            if max(loads) <= most:
                return order, together
        left -= rows_per_slot[slot]
    return order, len(order)


@cache
def _codes() -> dict[torch.dtype | str, int]:
    torch_cpu = _torch_cpu()
    codes: dict[torch.dtype | str, int] = {
        dtype: getattr(torch_cpu, f"aoti_torch_dtype_{name}")() for dtype, name in _DTYPES.items()
    }
    return codes | {"cpu": torch_cpu.aoti_torch_device_type_cpu()}


@cache
def _torch_functions() -> dict[str, int | None] | None:
    """Addresses of torch's functions by their fields in `_Call`; None in a build of torch without them."""
    try:
        torch_cpu = _torch_cpu()
        found = {field: getattr(torch_cpu, name) for field, name in _TORCH_FUNCTIONS.items()}
    except (OSError, AttributeError):
        return None
    return {field: ctypes.cast(function, ctypes.c_void_p).value for field, function in found.items()}


@cache
def _torch_cpu() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
