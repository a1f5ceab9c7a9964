"""The kernels' cases on a GPU. Not run yet on any: they are ready for the first machine that has one."""

from __future__ import annotations

import pytest
import torch

import dynmoe_kernels as kernels
from tests.kernels.cases import FLOATS, Case, Draw, all_cases, assert_rounded_once, kernel_cases

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
