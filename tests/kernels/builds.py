"""How every kernel is launched, for the compiler: with the block sizes that its launch would choose."""

from __future__ import annotations

from typing import Any

from dynmoe_kernels.jit import (
    gather_rows,
    plan,
    products_by_slot,
    sum_rows,
    sum_slots,
    top_any_gates,
    weighted_activation,
    weighted_bias,
    weighted_gated,
)
from dynmoe_kernels.jit.launch import along_a_row
from dynmoe_kernels.jit.slot import slot_block
from tests.kernels.compilation import Build, Target

SIZES = {"bf16": 2, "fp32": 4}
WIDTH, SLOTS, ROWS_PER_SLOT = 2048, 64, 128
MULTIPLES = ("D", "F", "K", "M", "stride_s", "stride_k", "stride_m", "tokens_per_split")


def builds(
    target: Target, dtype: str, num_slots: int = SLOTS, rows_per_slot: int = ROWS_PER_SLOT, width: int = WIDTH
) -> dict[str, Build]:
    """Every kernel by its name, for rows of `dtype`. Widths are multiples of 16, numbers of tokens and slots not.

    width: what the products by slot choose their blocks for.
    """
    block, warps = along_a_row(WIDTH, SIZES[dtype], target.lanes)
    indices = {"row_index": "*i64", "first_row": "*i64", "token_index": "*i64", "pair_index": "*i64", "mask": "*u8"}
    indices |= {"entry_index": "*i64", "rows_per_slot": "*i64", "rows_up_to": "*i64", "rows_per_block": "*i32"}
    indices |= {"rows_per_token": "*i32", "slot_ends": "*i32", "active": "*u8", "is_open": "*u8"}
    names = ("T", "S", "D", "F", "K", "M", "num_blocks", "num_cells", "num_rows", "num_tiles", "tokens_per_split")
    counts = dict.fromkeys((*names, "stride_s", "stride_k", "stride_m"), "i32")
    floats = ("row_weights", "grad_weights", "threshold", "scores", "lengths", "unit_rows", "partial")

    def build(kernel: Any, num_warps: int = 4, types: dict[str, str] | None = None, **constants: Any) -> Build:
        known = {**indices, **counts, **dict.fromkeys(floats, "*fp32"), **(types or {})}
        names = [name for name in kernel.arg_names if name not in constants]
        return Build(
            kernel=kernel,
            types={name: known.get(name, f"*{dtype}") for name in names},
            constants=constants,
            num_warps=num_warps,
            multiples=[name for name in names if name in MULTIPLES],
        )

    def row_wise(kernel: Any, **constants: Any) -> Build:
        name = "BLOCK_D" if "BLOCK_D" in kernel.arg_names else "BLOCK_F"
        if "BLOCK_S" in kernel.arg_names:
            constants["BLOCK_S"] = slot_block(num_slots)
        return build(kernel, warps, **{name: block}, **constants)

    of_plan = plan.plan_blocks(num_slots)
    of_gates = top_any_gates.gate_blocks(num_slots)
    of_products = products_by_slot.product_blocks(SIZES[dtype], rows_per_slot, (width, width))
    precision = "tf32x3" if target.is_nvidia else "ieee"
    as_products = {"PRECISION": precision if dtype == "fp32" else "ieee", "UPCAST": False}
    in_float32 = {"types": {"grad": "*fp32"}, "PRECISION": precision}
    # stride_k is 1: matrices as a layer gives them, transposed views of its parameters.
    by_slot = {"stride_k": 1, "BLOCK_S": slot_block(num_slots)}
    found = [
        build(plan.plan_count_kernel, **of_plan),
        build(plan.plan_fill_kernel, **of_plan, BLOCK_UNUSED=plan.UNUSED_PER_BLOCK),
        row_wise(gather_rows.gather_rows_kernel),
        row_wise(sum_rows.sum_rows_kernel),
        row_wise(weighted_gated.weighted_gated_kernel, ACTIVATION="silu"),
        row_wise(weighted_gated.weighted_gated_backward_kernel, ACTIVATION="silu", WITH_PRODUCT=True),
        row_wise(weighted_activation.weighted_activation_kernel, ACTIVATION="gelu"),
        row_wise(weighted_activation.weighted_activation_backward_kernel, ACTIVATION="gelu", WITH_PRODUCT=True),
        row_wise(weighted_bias.add_weighted_bias_kernel),
        row_wise(weighted_bias.weighted_bias_grad_weights_kernel),
        build(sum_slots.sum_slots_kernel, HAS_WEIGHTS=True, **sum_slots.SUM_SLOTS_BLOCKS),
        build(products_by_slot.multiply_by_slot_kernel, **by_slot, **as_products, **of_products["rows"]),
        build(products_by_slot.multiply_pairs_by_slot_kernel, **as_products, **of_products["pairs"]),
        build(top_any_gates.top_any_gates_kernel, **in_float32, **of_gates["forward"]),
        build(top_any_gates.cosine_scores_grad_hidden_kernel, **in_float32, **of_gates["grad_hidden"]),
        build(top_any_gates.cosine_scores_grad_rows_kernel, **in_float32, **of_gates["grad_rows"]),
    ]
    return {build.kernel.__name__: build for build in found}
