"""Scores of tokens against gate rows in C++, with one pass over the tokens in each direction."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build
from .torch_cpu import DTYPES, may_compute, torch_cpu

_LANES = 16
_TOKENS_PER_PART = 32  # at least


class _Call(ctypes.Structure):
    """`ScoresCall` in gate_scores.cpp."""

    _fields_ = (
        ("parallel_for", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "slots", "width")),
        *((name, ctypes.c_void_p) for name in ("hidden", "rows", "columns", "scores", "lengths")),
        *((name, ctypes.c_void_p) for name in ("grad", "grad_hidden", "grad_rows")),
        ("parts", ctypes.c_int64),
    )


def can_compute_gate_scores(hidden: Tensor, rows: Tensor) -> bool:
    """Whether `gate_scores` can work on these tensors, and may: with `auto` alone.

    It takes contiguous tokens [T, D] in float32 or bfloat16 and rows [S, D] in float32, on a CPU, D a multiple of 16.
    """
    return _are_taken(hidden, rows) and may_compute()


def gate_scores(hidden: Tensor, rows: Tensor, *, as_cosines: bool) -> tuple[Tensor, Tensor | None]:
    """`hidden @ rows.T` [T, S] in float32, each token's divided by its length as_cosines; and these lengths [T].

    Lengths of zero vectors are infinite.
    """
    scores = rows.new_empty(len(hidden), len(rows))
    lengths = rows.new_empty(len(hidden)) if as_cosines else None
    columns = F.pad(rows.T, (0, -len(rows) % _LANES)).contiguous()
    _run("gate_scores", hidden, rows, scores, lengths, columns=columns)
    return scores, lengths


def gate_scores_backward(
    grad: Tensor, hidden: Tensor, rows: Tensor, scores: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and rows from `grad` [T, S], contiguous; scores and lengths of cosines as they came out."""
    parts = max(1, min(torch.get_num_threads(), len(hidden) // _TOKENS_PER_PART))
    grad_hidden, grad_rows = torch.empty_like(hidden), rows.new_empty(parts, *rows.shape)
    gradients = {"grad": grad, "grad_hidden": grad_hidden, "grad_rows": grad_rows}
    _run("gate_scores_backward", hidden, rows, scores, lengths, parts=parts, **gradients)
    return grad_hidden, grad_rows.sum(0)


def _are_taken(hidden: Tensor, rows: Tensor) -> bool:
    return (
        hidden.dtype in DTYPES
        and rows.dtype == torch.float32
        and hidden.shape[1] % _LANES == 0
        and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (hidden, rows))
    )


def _run(
    name: str,
    hidden: Tensor,
    rows: Tensor,
    scores: Tensor | None,
    lengths: Tensor | None,
    *,
    parts: int = 0,
    **others: Tensor,
) -> None:
    """Call the function of that name."""
    given = {"hidden": hidden, "rows": rows, "scores": scores, "lengths": lengths, **others}
    tensors = {field: tensor for field, tensor in given.items() if tensor is not None}
    _check(tensors)
    of_torch = torch_cpu()
    assert of_torch is not None
    call = _Call(
        parallel_for=of_torch.functions["parallel_for"],
        tokens=len(hidden),
        slots=len(rows),
        width=hidden.shape[1],
        parts=parts,
        **{field: tensor.data_ptr() for field, tensor in tensors.items()},
    )
    if getattr(build.library(), f"{name}_{DTYPES[hidden.dtype]}")(ctypes.byref(call)) != 0:
        raise RuntimeError("torch could not compute gate scores on the CPU: its threads, or memory for them, failed.")


def _check(tensors: dict[str, Tensor]) -> None:
    """Bare pointers know no sizes. Raises: AssertionError."""
    (num_tokens, width), num_slots = tensors["hidden"].shape, len(tensors["rows"])
    shapes = {
        "rows": (num_slots, width),
        "columns": (width, num_slots + -num_slots % _LANES),
        "scores": (num_tokens, num_slots),
        "lengths": (num_tokens,),
        "grad": (num_tokens, num_slots),
    }
    assert _are_taken(tensors["hidden"], tensors["rows"])
    for field, tensor in tensors.items():
        if field not in shapes:
            continue
        assert tensor.shape == shapes[field], (field, tensor.shape, shapes[field])
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), (field, tensor.dtype, tensor.stride())
