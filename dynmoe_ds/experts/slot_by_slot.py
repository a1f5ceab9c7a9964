"""SwiGLU experts on a CPU: the whole network one slot after another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_VALUES_PER_PART = 1 << 16  # in float32 a handful of parts fit into a core's second-level cache
_CACHE_LINE_BYTES = 64


class SlotBySlot(torch.autograd.Function):
    """`w2 (w silu(w1 x) * (w3 x))` of sorted rows, a slot at a time, so that its activations are in cache when used.

    Beside the inputs it saves gate and up [N, F]; the weighted product is computed again, which is cheaper than storing
    it. Serves every dtype and size. Slots without rows cost nothing and get exact zeros as their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, row_weights: Tensor, rows_per_slot: list[int], w1: Tensor, w3: Tensor, w2: Tensor
    ) -> Tensor:
        gate, up = (rows.new_empty(len(rows), w1.shape[1]) for _ in range(2))
        ctx.save_for_backward(rows, row_weights, gate, up, w1, w3, w2)
        ctx.rows_per_slot = rows_per_slot
        return slot_by_slot(rows, row_weights, rows_per_slot, w1, w3, w2, (gate, up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_weights, gate, up, w1, w3, w2 = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(row_weights)
        wants = ctx.needs_input_grad[3:]
        grad1, grad3, grad2 = (
            torch.empty_like(t) if want else None for t, want in zip((w1, w3, w2), wants, strict=True)
        )
        buffers = _for_one_slot(3, rows, ctx.rows_per_slot, gate.shape[1])
        wide = _for_one_part(5, row_weights, ctx.rows_per_slot, gate.shape[1])
        for e, mine in enumerate(_rows_of_slots(ctx.rows_per_slot)):
            if mine.start == mine.stop:
                for weight_grad in (grad1, grad3, grad2):
                    if weight_grad is not None:
                        weight_grad[e].zero_()
                continue
            x, w, a, b, g, gw, gx = (t[mine] for t in (rows, row_weights, gate, up, grad, grad_weights, grad_rows))
            inner, ga, gb = (buffer[: len(x)] for buffer in buffers)
            torch.mm(g, w2[e], out=gb)
            for part in _parts(gb, ga, gw, inner, a, b, w):
                _weighted_swiglu_backward(wide, *part)
            if grad2 is not None:
                torch.mm(_transposed(g), inner, out=grad2[e])
            if grad1 is not None:
                torch.mm(ga.T, x, out=grad1[e])
            if grad3 is not None:
                torch.mm(gb.T, x, out=grad3[e])
            torch.mm(ga, w1[e], out=gx).addmm_(gb, w3[e])
        return grad_rows, grad_weights, None, grad1, grad3, grad2


def slot_by_slot(
    rows: Tensor,
    row_weights: Tensor,
    rows_per_slot: list[int],
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The outputs [N, D] of `SlotBySlot`. Leaves gate and up in `kept` [N, F] each; None keeps them for one slot only.

    Touches the weights of those slots alone that have rows.
    """
    out = torch.empty_like(rows)
    gate, up = kept or _for_one_slot(2, rows, rows_per_slot, w1.shape[1])
    (inner,) = _for_one_slot(1, rows, rows_per_slot, w1.shape[1])
    wide = _for_one_part(2, row_weights, rows_per_slot, w1.shape[1])
    for e, mine in enumerate(_rows_of_slots(rows_per_slot)):
        if mine.start < mine.stop:
            x = rows[mine]
            a, b = (gate[mine], up[mine]) if kept else (gate[: len(x)], up[: len(x)])
            torch.mm(x, w1[e].T, out=a)
            torch.mm(x, w3[e].T, out=b)
            torch.mm(_weighted_swiglu(a, b, row_weights[mine], inner, wide), w2[e].T, out=out[mine])
    return out


def _weighted_swiglu(gate: Tensor, up: Tensor, row_weights: Tensor, buffer: Tensor, wide: list[Tensor]) -> Tensor:
    """`silu(gate) * up * w` [n, F] in w's precision, rounded once to gate's; in the first rows of `buffer`."""
    out = buffer[: len(gate)]
    for a, b, column, product in _parts(gate, up, row_weights[:, None], out):
        silu = F.silu(_first_rows(wide[0], a).copy_(a), inplace=True)
        _store_product(silu.mul_(_widened(b, wide[1])), column, product)
    return out


def _weighted_swiglu_backward(
    wide: list[Tensor],
    grad_up: Tensor,
    grad_gate: Tensor,
    grad_weights: Tensor,
    product: Tensor,
    gate: Tensor,
    up: Tensor,
    row_weights: Tensor,
) -> None:
    """The gradients of gate, up [n, F] and w [n], and the weighted product itself once more, into the first four
    tensors, by way of the buffers `wide`.

    On entry `grad_up` holds the gradient of the weighted product.
    """
    column = row_weights[:, None]
    grad, a, b = (_widened(t, buffer) for t, buffer in zip((grad_up, gate, up), wide, strict=False))
    sigmoid = torch.sigmoid(a, out=_first_rows(wide[3], a))
    silu = torch.mul(sigmoid, a, out=_first_rows(wide[4], a))
    plain = torch.mul(silu, b, out=_first_rows(wide[1], a))
    torch.linalg.vecdot(grad, plain, out=grad_weights)
    _store_product(plain, column, product)
    weighted = grad.mul_(column)
    slope = torch.lerp(silu, silu.new_ones(()), sigmoid, out=sigmoid)  # silu'(a) = silu(a) + σ(a) (1 − silu(a))
    _store_product(slope.mul_(weighted), b, grad_gate)
    _store_product(silu, weighted, grad_up)


def _rows_of_slots(rows_per_slot: list[int]) -> Iterator[slice]:
    """Where the rows of each slot are."""
    ends = accumulate(rows_per_slot)
    return (slice(end - count, end) for count, end in zip(rows_per_slot, ends, strict=True))


def _parts(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`first` [n, F] and the others in parts of so few rows that all that is made of a part stays in the cache."""
    rows = _rows_per_part(first.shape[1])
    return zip(*(tensor.split(rows) for tensor in (first, *others)), strict=True)


def _rows_per_part(width: int) -> int:
    return max(torch.get_num_threads() * _VALUES_PER_PART // width, 1)


def _for_one_slot(count: int, like: Tensor, rows_per_slot: list[int], width: int) -> list[Tensor]:
    """Buffers [n, width] for the slot of most rows, of like's dtype.

    Rows are a cache line longer than that: at powers of two, products with a transposed one are 10 to 20 % slower.
    """
    padded = width + _CACHE_LINE_BYTES // like.element_size()
    return [like.new_empty(max(rows_per_slot), padded)[:, :width] for _ in range(count)]


def _for_one_part(count: int, like: Tensor, rows_per_slot: list[int], width: int) -> list[Tensor]:
    """Buffers [n, width] for a part of the slot of most rows, of like's dtype."""
    return [like.new_empty(min(_rows_per_part(width), max(rows_per_slot)), width) for _ in range(count)]


def _first_rows(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer if len(buffer) == len(like) else buffer[: len(like)]


def _widened(values: Tensor, buffer: Tensor) -> Tensor:
    """`values` in the precision of `buffer`: themselves, or a copy there."""
    return values if values.dtype == buffer.dtype else _first_rows(buffer, values).copy_(values)


def _store_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`a * b` into `out`; `a` may be overwritten."""
    if out.dtype == a.dtype:
        torch.mul(a, b, out=out)
    else:
        out.copy_(a.mul_(b))


def _transposed(grad: Tensor) -> Tensor:
    # A transposed left operand makes a product in 16 bits slower than the copy that avoids it.
    return grad.T.contiguous() if grad.element_size() == 2 else grad.T
