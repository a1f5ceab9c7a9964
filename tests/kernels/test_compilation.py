"""That every kernel compiles for every target, and fits. Whether it computes the right thing is what the cases show."""

import pkgutil
from dataclasses import replace
from importlib import import_module

import pytest

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for GPUs, and with the extra `dev`")

import dynmoe_kernels.jit
from dynmoe_kernels.jit import slot
from tests.kernels.builds import ROWS_PER_SLOT, builds
from tests.kernels.compilation import TARGETS, Machine, Target, compiled, faults

KERNELS = tuple(builds(TARGETS["sm_90"], "bf16"))

# 16 bytes at once.
WIDE = {
    "cuda": (r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32"),
    "hip": (r"(global|buffer)_load_dwordx4", r"(global|buffer)_store_dwordx4"),
}
MATRIX = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma", "gfx942": r"v_mfma_f32"}
# What every kernel must be made of: its loads, its stores, or a matrix product.
LOADS_AND_STORES = (
    "gather_rows_kernel",
    "sum_rows_kernel",
    "weighted_gated_kernel",
    "weighted_gated_backward_kernel",
    "weighted_activation_kernel",
    "weighted_activation_backward_kernel",
    "add_weighted_bias_kernel",
)
LOADS = ("weighted_bias_grad_weights_kernel", "sum_slots_kernel")
BY_SLOT = ("multiply_by_slot_kernel", "multiply_pairs_by_slot_kernel")
PRODUCTS = (*BY_SLOT, "top_any_gates_kernel", "cosine_scores_grad_hidden_kernel", "cosine_scores_grad_rows_kernel")


@pytest.fixture(autouse=True, scope="module")
def compiled_anew(tmp_path_factory: pytest.TempPathFactory):
    """What is compiled is not taken from what an earlier run left in Triton's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def expected_instructions(kernel: str, name: str, target: Target) -> list[str]:
    loads, stores = WIDE[target.gpu.backend]
    if kernel in LOADS_AND_STORES:
        return [loads, stores]
    if kernel in LOADS:
        return [loads]
    return [MATRIX[name]] if kernel in PRODUCTS else []


def assert_fits(kernel: str, dtype: str, name: str, **changes: object) -> Machine:
    """The compiled kernel, if there is nothing wrong with it."""
    target = TARGETS[name]
    machine = compiled(replace(builds(target, dtype)[kernel], **changes), target)
    instructions = [] if changes else expected_instructions(kernel, name, target)
    assert not (found := faults(machine, target, instructions)), found
    return machine


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_fits(kernel: str, name: str) -> None:
    machine = assert_fits(kernel, "bf16", name)
    print(f"| {kernel} | {name} | {machine.registers} | {machine.shared} |")  # docs/kernels.md is made from this


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if not kernel.startswith("plan")])
def test_a_kernel_fits_with_rows_of_float32(kernel: str) -> None:
    assert_fits(kernel, "fp32", "sm_90")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_fits_where_sizes_are_one(kernel: str) -> None:
    """Triton takes the integer 1 as a constant: one token, one slot, one row, one column."""
    build = builds(TARGETS["sm_90"], "bf16")[kernel]
    sizes = [name for name, kind in build.types.items() if kind == "i32" and name != "tokens_per_split"]
    others = {name: kind for name, kind in build.types.items() if name not in sizes}
    assert_fits(kernel, "bf16", "sm_90", types=others, ones=sizes)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel not in PRODUCTS])
def test_a_kernel_fits_where_no_size_is_a_multiple_of_16(kernel: str) -> None:
    assert_fits(kernel, "bf16", "sm_90", multiples=[])


@pytest.mark.parametrize("num_slots", [4, 300])
@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel.startswith(("plan", "top", "cosine"))])
def test_a_kernel_fits_with_few_and_with_many_slots(kernel: str, num_slots: int) -> None:
    target = TARGETS["sm_80"]
    build = replace(builds(target, "bf16", num_slots)[kernel], multiples=[])
    assert not faults(compiled(build, target), target, [])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("kernel", "rows_per_slot"), [(BY_SLOT[0], 4), (BY_SLOT[0], ROWS_PER_SLOT), (BY_SLOT[1], ROWS_PER_SLOT)]
)
def test_products_fit_where_no_size_is_a_multiple_of_16(kernel: str, rows_per_slot: int, dtype: str) -> None:
    target = TARGETS["sm_80"]
    build = builds(target, dtype, rows_per_slot=rows_per_slot, width=2047)[kernel]
    assert not faults(compiled(replace(build, multiples=[]), target), target, [MATRIX["sm_80"]])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_products_fit_with_matrices_by_rows(dtype: str) -> None:
    """As in the backward pass, where they are the parameters themselves."""
    target = TARGETS["sm_80"]
    build = builds(target, dtype)["multiply_by_slot_kernel"]
    constants = {name: value for name, value in build.constants.items() if name != "stride_k"} | {"stride_m": 1}
    types = {name: kind for name, kind in build.types.items() if name != "stride_m"} | {"stride_k": "i32"}
    by_rows = replace(build, types=types, constants=constants)
    assert not faults(compiled(by_rows, target), target, [MATRIX["sm_80"]])


@pytest.mark.parametrize(
    ("kernel", "flag", "absent"),
    [
        ("weighted_gated_backward_kernel", "WITH_PRODUCT", "product"),
        ("weighted_activation_backward_kernel", "WITH_PRODUCT", "product"),
        ("sum_slots_kernel", "HAS_WEIGHTS", "row_weights"),
    ],
)
def test_a_kernel_fits_without_what_is_optional(kernel: str, flag: str, absent: str) -> None:
    build = builds(TARGETS["sm_90"], "bf16")[kernel]
    types = {name: kind for name, kind in build.types.items() if name != absent}
    assert_fits(kernel, "bf16", "sm_90", types=types, constants={**build.constants, flag: False, absent: None})


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("kernel", ["weighted_gated_backward_kernel", "weighted_activation_backward_kernel"])
def test_a_kernel_fits_with_every_activation(kernel: str, activation: str) -> None:
    build = builds(TARGETS["sm_80"], "bf16")[kernel]
    assert_fits(kernel, "bf16", "sm_80", constants={**build.constants, "ACTIVATION": activation})


def test_every_kernel_is_built() -> None:
    found = set()
    for module in pkgutil.iter_modules(dynmoe_kernels.jit.__path__, "dynmoe_kernels.jit."):
        found |= {name for name in vars(import_module(module.name)) if name.endswith("_kernel")}
    assert found == set(KERNELS)
    assert slot.slot_of_row.__name__ == "slot_of_row"  # part of other kernels, and so not built by itself


def test_too_large_blocks_are_seen_to_spill() -> None:
    target = TARGETS["sm_80"]
    build = builds(target, "bf16")["cosine_scores_grad_hidden_kernel"]
    too_large = replace(build, constants={**build.constants, "BLOCK_S": 64, "BLOCK_D": 32}, num_warps=4)
    found = faults(compiled(too_large, target), target, [])
    assert len(found) == 1 and "spilled: its blocks are too large for 255 registers." in found[0]


def test_too_much_shared_memory_is_seen() -> None:
    """Triton compiles it all the same."""
    target = TARGETS["gfx942"]
    build = builds(target, "bf16")["cosine_scores_grad_rows_kernel"]
    too_large = replace(build, constants={**build.constants, "BLOCK_T": 128, "BLOCK_D": 256, "BLOCK_S": 16})
    found = faults(compiled(too_large, target), target, [])
    assert any("bytes of shared memory are more than 65536." in fault for fault in found), found


def test_narrow_accesses_are_seen() -> None:
    """Where nothing is known of the width, a row may begin anywhere."""
    target = TARGETS["sm_90"]
    build = replace(builds(target, "bf16")["gather_rows_kernel"], multiples=[])
    assert len(faults(compiled(build, target), target, WIDE["cuda"])) == 2
