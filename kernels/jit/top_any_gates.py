"""Top-any gates in one pass over the tokens, and the backward pass of their cosine scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_shapes, launch

_TOKENS_PER_SPLIT = 1024


@triton.jit
def top_any_gates_kernel(
    hidden,
    unit_rows,
    threshold,
    active,
    scores,
    lengths,
    is_open,
    T,
    D,
    S,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden [T, D], unit_rows [S, D] -> scores, is_open [T, S], lengths [T]. Grid: blocks of slots, fastest, times
    blocks of tokens, so that programs that run together read the same tokens."""
    slot_blocks = tl.cdiv(S, BLOCK_S)
    slot_block = tl.program_id(0) % slot_blocks
    t = (tl.program_id(0) // slot_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = slot_block * BLOCK_S + tl.arange(0, BLOCK_S)
    products = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (t[:, None] < T) & (d[None, :] < D)
        x = tl.load(hidden + t[:, None] * D + d[None, :], mask=inside, other=0).to(tl.float32)
        inside = (s[None, :] < S) & (d[:, None] < D)
        rows = tl.load(unit_rows + s[None, :] * D + d[:, None], mask=inside, other=0).to(tl.float32)
        squares += tl.sum(x * x, 1)
        products = tl.dot(x, rows, products, input_precision=PRECISION)
    length = tl.sqrt(squares)
    length = tl.where(length < 1e-12, float("inf"), length)
    score = products / length[:, None]
    limit = tl.load(threshold + s, mask=s < S, other=0).to(tl.float32)
    is_active = tl.load(active + s, mask=s < S, other=0) != 0
    inside = (t[:, None] < T) & (s[None, :] < S)
    cells = t[:, None] * S + s[None, :]
    tl.store(scores + cells, score, mask=inside)
    tl.store(is_open + cells, ((score > limit[None, :]) & is_active[None, :]).to(tl.uint8), mask=inside)
    if slot_block == 0:
        tl.store(lengths + t, length, mask=t < T)


@triton.jit
def cosine_scores_grad_hidden_kernel(
    grad,
    hidden,
    unit_rows,
    lengths,
    scores,
    grad_hidden,
    T,
    D,
    S,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d cos(x, r) / dx = r / |x| - cos(x, r) x / |x|². Grid: blocks of columns, fastest, times blocks of tokens."""
    columns = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (tl.program_id(0) % columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    length = tl.load(lengths + t, mask=t < T, other=1)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (t[:, None] < T) & (s[None, :] < S)
        g = tl.load(grad + t[:, None] * S + s[None, :], mask=inside, other=0).to(tl.float32) / length[:, None]
        along -= tl.sum(g * tl.load(scores + t[:, None] * S + s[None, :], mask=inside, other=0), 1)
        inside = (s[:, None] < S) & (d[None, :] < D)
        rows = tl.load(unit_rows + s[:, None] * D + d[None, :], mask=inside, other=0).to(tl.float32)
        total = tl.dot(g, rows, total, input_precision=PRECISION)
    inside = (t[:, None] < T) & (d[None, :] < D)
    cells = t[:, None] * D + d[None, :]
    x = tl.load(hidden + cells, mask=inside, other=0).to(tl.float32)
    total += x * (along / length)[:, None]
    tl.store(grad_hidden + cells, total.to(grad_hidden.dtype.element_ty), mask=inside)


@triton.jit
def cosine_scores_grad_rows_kernel(
    grad,
    hidden,
    lengths,
    partial,
    T,
    D,
    S,
    tokens_per_split,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of the rows from one split of the tokens: partial [splits, S, D]. Grid: splits, blocks of slots, of
    columns."""
    split = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for start in range(0, tokens_per_split, BLOCK_T):
        t = split * tokens_per_split + start + tl.arange(0, BLOCK_T)
        length = tl.load(lengths + t, mask=t < T, other=1)
        inside = (t[None, :] < T) & (s[:, None] < S)
        g = tl.load(grad + t[None, :] * S + s[:, None], mask=inside, other=0).to(tl.float32) / length[None, :]
        inside = (t[:, None] < T) & (d[None, :] < D)
        x = tl.load(hidden + t[:, None] * D + d[None, :], mask=inside, other=0).to(tl.float32)
        total = tl.dot(g, x, total, input_precision=PRECISION)
    inside = (s[:, None] < S) & (d[None, :] < D)
    tl.store(partial + (split * S + s[:, None]) * D + d[None, :], total, mask=inside)


def gate_blocks(num_slots: int) -> dict[str, dict[str, int]]:
    """Block sizes and warps of the three kernels, large ones that fit into the registers of all targets.

    They also fit where D is no multiple of 16, which takes more. Tiles of products take at least 16 of everything.
    """
    slots = min(max(triton.next_power_of_2(num_slots), 16), 64)
    return {
        "forward": {"BLOCK_T": 64, "BLOCK_S": min(slots, 32), "BLOCK_D": 32, "num_warps": 4},
        "grad_hidden": {"BLOCK_T": 64, "BLOCK_S": 16, "BLOCK_D": 128, "num_warps": 8},
        "grad_rows": {"BLOCK_T": 32, "BLOCK_S": slots, "BLOCK_D": 64, "num_warps": max(slots // 8, 4)},
    }


def precision() -> str:
    """How float32 is multiplied: as float32 from three products of TF32 where there is TF32, on NVIDIA's GPUs."""
    return "tf32x3" if torch.version.hip is None else "ieee"


def launch_top_any_gates(
    hidden: Tensor, unit_rows: Tensor, threshold: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [T, S], lengths [T] and open gates [T, S] bool."""
    (T, D), S, device = hidden.shape, len(unit_rows), hidden.device
    check_shapes(unit_rows=(unit_rows, (S, D)), threshold=(threshold, (S,)), active=(active, (S,)))
    scores = torch.empty(T, S, dtype=torch.float32, device=device)
    lengths = torch.empty(T, dtype=torch.float32, device=device)
    is_open = torch.empty(T, S, dtype=torch.bool, device=device)
    blocks = gate_blocks(S)["forward"]
    launch(
        top_any_gates_kernel,
        (triton.cdiv(S, blocks["BLOCK_S"]) * triton.cdiv(T, blocks["BLOCK_T"]),),
        device,
        hidden.contiguous(),
        unit_rows.contiguous(),
        threshold.contiguous(),
        active.contiguous().view(torch.uint8),
        scores,
        lengths,
        is_open.view(torch.uint8),
        T,
        D,
        S,
        PRECISION=precision(),
        **blocks,
    )
    return scores, lengths, is_open


def launch_cosine_scores_backward(
    grad: Tensor, hidden: Tensor, unit_rows: Tensor, lengths: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [T, D] and of unit_rows [S, D]."""
    (T, D), S, device = hidden.shape, len(unit_rows), hidden.device
    check_shapes(unit_rows=(unit_rows, (S, D)), lengths=(lengths, (T,)), grad=(grad, (T, S)), scores=(scores, (T, S)))
    grad, hidden, lengths, scores = (t.contiguous() for t in (grad, hidden, lengths, scores))
    grad_hidden = torch.empty_like(hidden)
    blocks = gate_blocks(S)["grad_hidden"]
    launch(
        cosine_scores_grad_hidden_kernel,
        (triton.cdiv(D, blocks["BLOCK_D"]) * triton.cdiv(T, blocks["BLOCK_T"]),),
        device,
        grad,
        hidden,
        unit_rows.contiguous(),
        lengths,
        scores,
        grad_hidden,
        T,
        D,
        S,
        PRECISION=precision(),
        **blocks,
    )
    blocks = gate_blocks(S)["grad_rows"]
    splits = triton.cdiv(T, _TOKENS_PER_SPLIT)
    partial = torch.empty(splits, S, D, dtype=torch.float32, device=device)
    launch(
        cosine_scores_grad_rows_kernel,
        (splits, triton.cdiv(S, blocks["BLOCK_S"]), triton.cdiv(D, blocks["BLOCK_D"])),
        device,
        grad,
        hidden,
        lengths,
        partial,
        T,
        D,
        S,
        _TOKENS_PER_SPLIT,
        PRECISION=precision(),
        **blocks,
    )
    return grad_hidden, partial.sum(0)
