"""`silu(gate) * up * weight` into given tensors: the form for CPUs, in C++ and in plain torch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .cpu.build import library
from .selection import chosen_kernels
from .weighted_gated import weighted_gated_backward_torch, weighted_gated_torch

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_VALUES_PER_THREAD = 1 << 14  # with fewer, waking a thread takes longer than it saves


def weighted_swiglu_into(product: Tensor, gate: Tensor, up: Tensor, row_weights: Tensor) -> None:
    """`silu(gate) * up * w` [n, F] into `product`, in w's precision, rounded once; on a CPU.

    gate, up, product [n, F], whose rows may be parts of longer ones; w [n]. C++ serves float32 and bfloat16 with w in
    float32, unless plain torch is chosen (`chosen_kernels`) or there is no compiler.
    """
    if not _use_cpp(row_weights, product, gate, up):
        product.copy_(weighted_gated_torch(gate, up, row_weights))
        return
    arguments = [*_rows(gate), *_rows(up), _start(row_weights), *_rows(product)]
    _call("weighted_swiglu", gate, arguments)


def weighted_swiglu_backward_into(
    grad_up: Tensor,
    grad_gate: Tensor,
    grad_weights: Tensor,
    product: Tensor,
    gate: Tensor,
    up: Tensor,
    row_weights: Tensor,
) -> None:
    """Gradients of up, gate [n, F] and w [n], and the weighted product once more, into the first four tensors.

    On entry `grad_up` holds the gradient of the weighted product. Otherwise as `weighted_swiglu_into`.
    """
    if not _use_cpp(row_weights, grad_up, grad_gate, product, gate, up) or grad_weights.dtype != torch.float32:
        found = weighted_gated_backward_torch(grad_up, gate, up, row_weights, with_product=True)
        for place, values in zip((grad_gate, grad_up, grad_weights, product), found, strict=True):
            assert values is not None
            place.copy_(values)
        return
    arguments = [*_rows(grad_up), *_rows(gate), *_rows(up), _start(row_weights), *_rows(grad_gate)]
    _call("weighted_swiglu_backward", gate, [*arguments, _start(grad_weights), *_rows(product)])


def _use_cpp(row_weights: Tensor, *matrices: Tensor) -> bool:
    """Whether the functions in C++ can work on these tensors, and may."""
    first = matrices[0]
    assert all(m.shape == (len(row_weights), first.shape[1]) for m in matrices), [m.shape for m in matrices]
    return (
        first.dtype in _DTYPES
        and row_weights.dtype == torch.float32
        and all(m.dtype == first.dtype and m.device.type == "cpu" and m.stride(1) == 1 for m in matrices)
        and chosen_kernels() == "auto"
        and library() is not None
    )


def _rows(matrix: Tensor) -> list[int]:
    return [matrix.data_ptr(), matrix.stride(0)]


def _start(values: Tensor) -> int:
    assert values.is_contiguous()
    return values.data_ptr()


def _call(name: str, like: Tensor, arguments: list[int]) -> None:
    """Call a function of the library; the sizes and the number of threads come last."""
    num_rows, width = like.shape
    threads = max(min(torch.get_num_threads(), like.numel() // _VALUES_PER_THREAD), 1)
    function: Any = getattr(library(), f"{name}_{_DTYPES[like.dtype]}")
    function(*map(ctypes.c_void_p, arguments), ctypes.c_int64(num_rows), ctypes.c_int64(width), ctypes.c_int(threads))
