"""Scores of tokens against gate rows in C++, with one pass over the tokens in each direction."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build
from .torch_cpu import DTYPES, may_compute, torch_cpu

_PADDING = 16
_MOST_SLOTS = 128
"""With as many cosines took 0.8 (AVX-512) to 1.1 (AVX2) of torch's time: its products are in blocks of rows, too."""

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
    """Whether the functions here can work on these tensors, and may: with `auto` alone.

    They take contiguous tokens [T, D] in float32 or bfloat16 and at most 128 rows [S, D] in float32, on a CPU, D a
    multiple of 16.
    """
    return _are_taken(hidden, rows) and may_compute()


def gate_scores(hidden: Tensor, rows: Tensor) -> Tensor:
    """`hidden @ rows.T` [T, S] in float32. Raises: RuntimeError if torch's threads fail."""
    scores = rows.new_empty(len(hidden), len(rows))
    _run("gate_scores", hidden, rows, scores=scores, columns=_columns(rows))
    return scores


def gate_cosines(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [T, S], each divided by the length of its token, and these lengths [T]: infinite for zero vectors.

    Raises: RuntimeError if torch's threads fail.
    """
    scores, lengths = rows.new_empty(len(hidden), len(rows)), rows.new_empty(len(hidden))
    _run("gate_scores", hidden, rows, scores=scores, lengths=lengths, columns=_columns(rows))
    return scores, lengths


def gate_scores_backward(
    grad: Tensor, hidden: Tensor, rows: Tensor, cosines: tuple[Tensor, Tensor] | None, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those gradients of hidden and rows that are wanted, from `grad` [T, S].

    cosines: what `gate_cosines` gave; None for the gradients of `gate_scores`. Raises: RuntimeError if torch's threads
    fail.
    """
    parts = min(torch.get_num_threads(), len(hidden) // max(_TOKENS_PER_PART, len(rows))) or 1
    scores, lengths = cosines or (None, None)
    grad_hidden = torch.empty_like(hidden) if wants[0] else None
    grad_rows = rows.new_empty(parts, *rows.shape) if wants[1] else None
    gradients = {"grad": grad.contiguous(), "grad_hidden": grad_hidden, "grad_rows": grad_rows}
    _run("gate_scores_backward", hidden, rows, scores=scores, lengths=lengths, parts=parts, **gradients)
    if grad_rows is None:
        return grad_hidden, None
    return grad_hidden, grad_rows[0] if parts == 1 else grad_rows.sum(0)


def _are_taken(hidden: Tensor, rows: Tensor) -> bool:
    return (
        hidden.dtype in DTYPES
        and rows.dtype == torch.float32
        and 1 <= len(rows) <= _MOST_SLOTS
        and hidden.shape[1] % _PADDING == 0
        and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (hidden, rows))
    )


def _columns(rows: Tensor) -> Tensor:
    return F.pad(rows.T, (0, -len(rows) % _PADDING)).contiguous()


def _run(name: str, hidden: Tensor, rows: Tensor, *, parts: int = 0, **others: Tensor | None) -> None:
    """Call the function of that name."""
    tensors = {"hidden": hidden, "rows": rows}
    tensors |= {field: tensor for field, tensor in others.items() if tensor is not None}
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
        raise RuntimeError("torch could not compute gate scores on the CPU.")


def _check(tensors: dict[str, Tensor]) -> None:
    """Bare pointers know no sizes. Raises: AssertionError."""
    (num_tokens, width), num_slots = tensors["hidden"].shape, len(tensors["rows"])
    shapes = {
        "rows": (num_slots, width),
        "columns": (width, num_slots + -num_slots % _PADDING),
        "scores": (num_tokens, num_slots),
        "lengths": (num_tokens,),
        "grad": (num_tokens, num_slots),
    }
    assert _are_taken(tensors["hidden"], tensors["rows"])
    for field in (field for field in shapes if field in tensors):
        tensor = tensors[field]
        assert tensor.shape == shapes[field], (field, tensor.shape, shapes[field])
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), (field, tensor.dtype, tensor.stride())
