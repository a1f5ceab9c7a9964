"""`silu(gate) * up * weight` and its backward pass by the functions in C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..selection import chosen_kernels
from .build import library

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def use_cpp(row_weights: Tensor, *matrices: Tensor) -> bool:
    """Whether the functions in C++ can work on these tensors, and may: with `auto` alone.

    They serve matrices [n, F] on a CPU in float32 or bfloat16, whose rows may be parts of longer ones, and row_weights
    [n] in float32.
    """
    dtype = matrices[0].dtype
    return (
        dtype in _DTYPES
        and row_weights.dtype == torch.float32
        and row_weights.is_contiguous()
        and all(m.dtype == dtype and m.device.type == "cpu" and m.stride(1) == 1 for m in matrices)
        and chosen_kernels() == "auto"
        and library() is not None
    )


def weighted_swiglu_cpp(gate: Tensor, up: Tensor, row_weights: Tensor, product: Tensor) -> None:
    """The product into the last tensor."""
    _call("weighted_swiglu", gate, up, row_weights, product)


def weighted_swiglu_backward_cpp(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    row_weights: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor,
    grad_weights: Tensor,
    product: Tensor,
) -> None:
    """Gradients, and the product once more, into the last four tensors; grad_up may be `grad` itself."""
    _call("weighted_swiglu_backward", grad, gate, up, row_weights, grad_gate, grad_up, grad_weights, product)


def _call(name: str, *tensors: Tensor) -> None:
    """Call a function of the library; matrices come with their strides, the sizes and the number of threads last."""
    num_rows, width = tensors[0].shape
    arguments: list[Any] = []
    for tensor in tensors:
        arguments.append(ctypes.c_void_p(tensor.data_ptr()))
        if tensor.dim() == 2:
            assert tensor.shape == (num_rows, width), (tensor.shape, tensors[0].shape)
            arguments.append(ctypes.c_int64(tensor.stride(0)))
        else:
            assert tensor.shape == (num_rows,) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    function = getattr(library(), f"{name}_{_DTYPES[tensors[0].dtype]}")
    function(*arguments, ctypes.c_int64(num_rows), ctypes.c_int64(width), ctypes.c_int(torch.get_num_threads()))
