"""Matrix products of rows that are sorted by slot with one matrix per slot. The slots' ends stay on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_shapes, launch
from .slot import slot_block

_MANY_ROWS = 64


@triton.jit
def multiply_by_slot_kernel(
    rows,
    matrices,
    slot_ends,
    products,
    K,
    M,
    S,
    num_tiles,
    stride_s,
    stride_k,
    stride_m,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """rows [R, K], matrices [S, K, M] of any strides, slot_ends [S] -> products [R, M].

    Grid: tiles of rows times blocks of columns; GROUP tiles go through the columns together, so that they find rows
    and matrices in the cache. A tile is of one slot, which is looked up here: the host knows `num_tiles`, how many
    there are at most, and those beyond the slots' own have nothing to do."""
    columns = tl.cdiv(M, BLOCK_M)
    tile, column = tl.swizzle2d(tl.program_id(0) // columns, tl.program_id(0) % columns, num_tiles, columns, GROUP)
    s = tl.arange(0, BLOCK_S)
    firsts = tl.load(slot_ends + s - 1, mask=(s > 0) & (s < S), other=0)
    lasts = tl.load(slot_ends + s, mask=s < S, other=0)
    tiles = tl.where(s < S, tl.cdiv(lasts - firsts, BLOCK_R), 0)
    slot = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (s < S)).to(tl.int32), 0)
    if slot < S:
        tile_of_slot = tile - tl.sum(tl.where(s < slot, tiles, 0), 0)
        first = tl.load(slot_ends + slot - 1, mask=slot > 0, other=0) + tile_of_slot * BLOCK_R
        r = tl.arange(0, BLOCK_R)
        m = tl.arange(0, BLOCK_M)
        k = tl.arange(0, BLOCK_K)
        is_row = r < tl.load(slot_ends + slot) - first
        is_column = column * BLOCK_M + m < M
        # Where a block begins may be beyond 32 bits, what is inside is not.
        x_cells = rows + first.to(tl.int64) * K + (r[:, None] * K + k[None, :])
        w_cells = matrices + slot.to(tl.int64) * stride_s + column.to(tl.int64) * BLOCK_M * stride_m
        w_cells += k[:, None] * stride_k + m[None, :] * stride_m
        total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            is_k = k < K - start
            x = tl.load(x_cells, mask=is_row[:, None] & is_k[None, :], other=0)
            w = tl.load(w_cells, mask=is_k[:, None] & is_column[None, :], other=0)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            total = tl.dot(x, w, total, input_precision=PRECISION)
            x_cells += BLOCK_K
            w_cells += BLOCK_K * stride_k
        cells = products + first.to(tl.int64) * M + column * BLOCK_M + (r[:, None] * M + m[None, :])
        tl.store(cells, total.to(products.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def multiply_pairs_by_slot_kernel(
    left,
    right,
    slot_ends,
    sums,
    M,
    K,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """left [R, M], right [R, K], slot_ends [S] -> sums [S, M, K]. Grid: blocks of a sum, slots.

    A program goes through all rows of its slot: a fixed order, and no atomics."""
    columns = tl.cdiv(K, BLOCK_K)
    block_m, block_k = tl.swizzle2d(
        tl.program_id(0) // columns, tl.program_id(0) % columns, tl.cdiv(M, BLOCK_M), columns, GROUP
    )
    slot = tl.program_id(1).to(tl.int64)
    first = tl.load(slot_ends + slot - 1, mask=slot > 0, other=0)
    last = tl.load(slot_ends + slot)
    r = tl.arange(0, BLOCK_R)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    x_cells = left + first.to(tl.int64) * M + (r[None, :] * M + m[:, None])
    y_cells = right + first.to(tl.int64) * K + (r[:, None] * K + k[None, :])
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(first, last, BLOCK_R):
        is_row = r < last - start
        x = tl.load(x_cells, mask=is_row[None, :] & (m < M)[:, None], other=0)
        y = tl.load(y_cells, mask=is_row[:, None] & (k < K)[None, :], other=0)
        if UPCAST:
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        x_cells += BLOCK_R * M
        y_cells += BLOCK_R * K
    cells = sums + slot * M * K + m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(cells, total.to(sums.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])


def product_blocks(element_size: int, rows_per_slot: int, widths: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Block sizes and warps of the two kernels, large ones that fit into registers and shared memory of all targets.

    rows_per_slot: what the slots have on average. With few, most of a large tile would be empty. widths: K and M; what
    is no multiple of 16 is read a number at a time, which takes more registers.
    """
    rows, warps = (128, 8) if rows_per_slot > _MANY_ROWS else (32, 4)
    if element_size == 2:
        deep = 32 if any(width % 16 for width in widths) else 64
        of_rows = {"BLOCK_R": rows, "BLOCK_M": 128, "BLOCK_K": deep, "num_warps": warps}
        of_pairs = {"BLOCK_R": deep, "BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 8}
    else:
        of_rows = {"BLOCK_R": rows, "BLOCK_M": 64, "BLOCK_K": 32, "num_warps": warps}
        of_pairs = {"BLOCK_R": 32, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8}
    return {"rows": {**of_rows, "GROUP": 8}, "pairs": {**of_pairs, "GROUP": 8}}


def product_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 as TF32 if torch's own products on GPUs do, else in three products of TF32.

    The three have float32's precision; on AMD's GPUs float32 is multiplied as it is. 16-bit numbers take no notice.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    # Holds for `allow_tf32` and `set_float32_matmul_precision` too; those fail where the newer setting was used.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def most_tiles(num_rows: int, num_slots: int, block: int) -> int:
    """The most tiles of `block` rows that `num_rows` rows of `num_slots` slots can have, each being of one slot."""
    used_slots = min(num_rows, num_slots)
    return (num_rows + used_slots * (block - 1)) // block


def launch_multiply_by_slot(rows: Tensor, matrices: Tensor, slot_ends: Tensor) -> Tensor:
    """The products [R, M]; undefined in rows after all ends."""
    (R, K), (S, _, M) = rows.shape, matrices.shape
    check_shapes(matrices=(matrices, (S, K, M)), slot_ends=(slot_ends, (S,)))
    assert rows.dtype == matrices.dtype, (rows.dtype, matrices.dtype)
    products = rows.new_empty(R, M)
    blocks = product_blocks(rows.element_size(), R // S, (K, M))["rows"]
    num_tiles = most_tiles(R, S, blocks["BLOCK_R"])
    launch(
        multiply_by_slot_kernel,
        (num_tiles * triton.cdiv(M, blocks["BLOCK_M"]),),
        rows.device,
        rows.contiguous(),
        matrices,
        slot_ends,
        products,
        K,
        M,
        S,
        num_tiles,
        *matrices.stride(),
        PRECISION=product_precision(rows.dtype),
        UPCAST=_must_upcast(rows),
        BLOCK_S=slot_block(S),
        **blocks,
    )
    return products


def launch_multiply_pairs_by_slot(left: Tensor, right: Tensor, slot_ends: Tensor) -> Tensor:
    """The sums [S, M, K]."""
    (R, M), (_, K), S = left.shape, right.shape, len(slot_ends)
    check_shapes(right=(right, (R, K)))
    assert left.dtype == right.dtype, (left.dtype, right.dtype)
    sums = left.new_empty(S, M, K)
    blocks = product_blocks(left.element_size(), R // S, (M, K))["pairs"]
    launch(
        multiply_pairs_by_slot_kernel,
        (triton.cdiv(M, blocks["BLOCK_M"]) * triton.cdiv(K, blocks["BLOCK_K"]), S),
        left.device,
        left.contiguous(),
        right.contiguous(),
        slot_ends,
        sums,
        M,
        K,
        PRECISION=product_precision(left.dtype),
        UPCAST=_must_upcast(left),
        **blocks,
    )
    return sums


def _must_upcast(rows: Tensor) -> bool:
    """Triton's interpreter multiplies bfloat16 by its bits as if they were integers."""
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16
