"""The kernels' cases on a GPU. Not run yet on any: they are ready for the first machine that has one."""

from __future__ import annotations

import pytest
import torch

import dynmoe_kernels as kernels
from dynmoe_kernels.products_by_slot import multiply_by_slot_torch
from tests.kernels.cases import FLOATS, Case, Draw, all_cases, assert_rounded_once, kernel_cases, slot_ends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_a_kernel(case: Case) -> None:
    with kernels.forced_kernels("triton"):
        case.run("cuda")


@pytest.mark.parametrize("case", list(all_cases([*FLOATS, torch.float64])), ids=str)
def test_a_twin(case: Case) -> None:
    with kernels.forced_kernels("torch"):
        case.run("cuda")


def test_kernels_are_the_automatic_choice() -> None:
    assert kernels.use_triton(torch.zeros(1, device="cuda"))
    assert not kernels.use_triton(torch.zeros(1, device="cuda", dtype=torch.float64))


def test_a_plan_with_a_given_number_of_rows_does_not_wait_for_the_device() -> None:
    mask = torch.rand(100, 7, device="cuda") < 0.3
    kernels.plan(mask, 700)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.plan(mask, 700)
        with pytest.raises(RuntimeError):
            kernels.plan(mask, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_of_activations_beyond_32_bits() -> None:
    """The last of 2^21 + 1 rows of 1024 begins after 2^31 elements. Takes 9 GB."""
    gate = torch.zeros(2**21 + 1, 1024, dtype=torch.bfloat16, device="cuda")
    gate[-1:] = Draw("cuda", torch.bfloat16)(1, 1024)
    expected = torch.nn.functional.silu(gate[-1:].double()) * gate[-1:].double()
    with kernels.forced_kernels("triton"):
        product = kernels.weighted_gated(gate, gate, torch.ones(len(gate), device="cuda"), "silu")
    assert_rounded_once(product[-1:], expected, "weighted_gated")
    assert not product[0].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_by_slot_do_not_wait_for_the_device(dtype: torch.dtype) -> None:
    """`grouped_mm` does, where it has no kernel: when that ends, a test here fails, and it can take over."""
    rows, matrices, ends = (
        Draw("cuda", dtype)(200, 64), Draw("cuda", dtype)(3, 64, 32), slot_ends([120, 0, 80], "cuda")
    )  # fmt: skip

    def products() -> None:
        out = kernels.multiply_by_slot(rows, matrices.transpose(1, 2).contiguous().transpose(1, 2), ends)
        kernels.multiply_by_slot(out, matrices.transpose(1, 2), ends)
        kernels.multiply_pairs_by_slot(rows, out, ends)

    products()  # compiles
    has_kernel = torch.cuda.get_device_capability()[0] in (9, 10) and torch.version.hip is None
    torch.cuda.set_sync_debug_mode("error")
    try:
        products()
        if dtype == torch.bfloat16 and has_kernel:
            multiply_by_slot_torch(rows, matrices, ends)
        else:
            with pytest.raises(RuntimeError):
                multiply_by_slot_torch(rows, matrices, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_float32_products_are_as_precise_as_torch_is_told() -> None:
    rows, matrices = Draw("cuda", torch.float32)(300, 512), Draw("cuda", torch.float32)(1, 512, 64)
    exact = rows.double() @ matrices[0].double()
    setting, errors = torch.backends.cuda.matmul, {}
    before = setting.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            setting.fp32_precision = precision
            with kernels.forced_kernels("triton"):
                got = kernels.multiply_by_slot(rows, matrices, slot_ends([300], "cuda"))
            errors[precision] = ((got - exact).abs().max() / exact.abs().max()).item()
    finally:
        setting.fp32_precision = before
    assert errors["ieee"] < 1e-6 and errors["tf32"] < 2e-3, errors
    if torch.version.hip is None:
        assert errors["tf32"] > 1e-5, errors


def test_products_of_rows_beyond_32_bits() -> None:
    """The last row begins after 2^31 elements, and so does the last matrix. Takes 14 GB."""
    num_rows, width = 2**21 + 1, 1024
    draw, ends = Draw("cuda", torch.bfloat16), slot_ends([num_rows - 1, 1], "cuda")
    rows = torch.zeros(num_rows, width, dtype=torch.bfloat16, device="cuda")
    rows[-1:] = draw(1, width)
    matrices, grad = draw(2, width, 16), torch.ones(num_rows, 16, dtype=torch.bfloat16, device="cuda")
    with kernels.forced_kernels("triton"):
        products = kernels.multiply_by_slot(rows, matrices, ends)
        sums = kernels.multiply_pairs_by_slot(rows, grad, ends)
        wide = kernels.multiply_by_slot(grad, matrices.transpose(1, 2), ends)
    assert_rounded_once(products[-1:], rows[-1:].double() @ matrices[1].double(), "products")
    assert_rounded_once(sums[1], rows[-1:].double().T @ grad[-1:].double(), "sums")
    assert_rounded_once(wide[-1:], grad[-1:].double() @ matrices[1].T.double(), "wide products")
    assert not products[0].any() and not sums[0].any()
