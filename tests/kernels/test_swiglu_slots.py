"""SwiGLU experts of all slots in C++: what they compute, on which threads, and where they cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dynmoe_kernels as kernels
from dynmoe_kernels.cpu import build, torch_cpu
from dynmoe_kernels.cpu.swiglu_slots import divide
from tests.helpers.products import HookedProducts
from tests.helpers.reference import assert_near

MODULE: Any = import_module("dynmoe_kernels.cpu.swiglu_slots")
EVEN, WITH_EMPTY, ONE_FULL, NONE = [6, 5, 6, 7, 6, 6], [0, 9, 0, 3, 8, 0], [60, 2, 1, 0, 3, 1], [0] * 6
D, F = 24, 40


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(counts: list[int], dtype: torch.dtype, spare: int = 0) -> tuple[list[Tensor], Tensor]:
    """Rows (NaN in those of no slot), their weights, w1, w3, w2; and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(counts) + spare, D), (6, F, D), (6, F, D), (6, D, F), (sum(counts) + spare, D)]
    rows, *parameters, grad = ((torch.randn(*shape, generator=generator) / 2).to(dtype) for shape in shapes)
    for of_rows in (rows, grad):
        of_rows[sum(counts) :] = torch.nan
    return [rows, torch.rand(len(rows), generator=generator), *parameters], grad


def run(counts: list[int], tensors: list[Tensor], grad: Tensor, wants: tuple[bool, ...] = (True,) * 3) -> list[Any]:
    """The output without and with gate and up kept, then the gradients."""
    rows, weights, *parameters = tensors
    kept = tuple(rows.new_full((len(rows), F), 7.0) for _ in range(2))
    outputs = [kernels.swiglu_slots(rows, weights, counts, *parameters, kept=keep) for keep in (None, kept)]
    return [*outputs, *kernels.swiglu_slots_backward(grad, rows, weights, counts, *parameters, *kept, wants)]


@contextmanager
def filled_memory() -> Iterator[None]:
    """Inside, new tensors hold NaN, so that nothing is zero by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("counts", [EVEN, WITH_EMPTY, ONE_FULL, NONE], ids=["even", "with empty", "one full", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_the_formula(dtype: torch.dtype, counts: list[int], spare: int, threads: int) -> None:
    tensors, grad = inputs(counts, dtype, spare)
    num_rows = sum(counts)
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    rows, weights, w1, w3, w2 = (wide[0][:num_rows], wide[1][:num_rows], *wide[2:])
    parts = zip(rows.split(counts), weights.split(counts), w1, w3, w2, strict=True)
    outputs = [w[:, None] * ((torch.nn.functional.silu(x @ a.T) * (x @ b.T)) @ c.T) for x, w, a, b, c in parts]
    want = torch.cat(outputs)
    gradients = torch.autograd.grad(want, wide, grad[:num_rows].double())

    with filled_memory():
        found = run(counts, tensors, grad)
    for got, exact in zip(found[:4], (want, want, *gradients[:2]), strict=True):
        assert_near(got[:num_rows], exact[:num_rows].detach(), dtype)
    for got, exact in zip(found[4:], gradients[2:], strict=True):
        assert_near(got, exact, dtype)
        assert not got[[slot for slot, count in enumerate(counts) if not count]].any(), "slots without rows"


@pytest.mark.parametrize("counts", [EVEN, ONE_FULL], ids=["even", "one full"])
def test_the_same_bits_every_time(counts: list[int], threads: int) -> None:
    """Whichever thread takes a slot."""
    tensors, grad = inputs(counts, torch.float32)
    first = run(counts, tensors, grad)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(counts, tensors, grad), strict=True))


def test_slots_go_to_several_threads(threads: int) -> None:
    tensors, grad = inputs(EVEN, torch.float32)
    with HookedProducts() as products:
        run(EVEN, tensors, grad)
    shared = divide(EVEN, threads)[1]
    for first, per_slot in ((0, 3), (3, 3), (6, 6)):
        of_call = products.threads[first * len(EVEN) :][: per_slot * len(EVEN)]
        assert len(of_call) == per_slot * len(EVEN)
        assert len(set(of_call[per_slot * shared :])) == threads, "a slot each"
        assert len(set(of_call[: per_slot * shared])) <= 1, "shared ones come from the thread that called"


@pytest.mark.parametrize("wants", [(True, False, True), (False, True, False), (False, False, False)])
def test_gradients_that_nobody_wants_are_not_computed(wants: tuple[bool, ...]) -> None:
    tensors, grad = inputs(EVEN, torch.float32)
    whole = run(EVEN, tensors, grad)
    with HookedProducts() as products:
        found = run(EVEN, tensors, grad, wants)
    assert len(products.threads) == len(EVEN) * (3 + 3 + 3 + sum(wants))
    for got, want, is_wanted in zip(found[4:], whole[4:], wants, strict=True):
        assert torch.equal(got, want) if is_wanted else got is None
    assert all(torch.equal(a, b) for a, b in zip(found[:4], whole[:4], strict=True))


@pytest.mark.parametrize("name", ["mm_out", "addmm_out"])
def test_a_product_that_fails_is_an_error(name: str, threads: int) -> None:
    """Forwards, and backwards in the one product that adds; on every thread."""
    tensors, grad = inputs(EVEN, torch.float32)
    with HookedProducts(fails=name) as products, pytest.raises(RuntimeError) as caught:
        run(EVEN, tensors, grad)
    assert str(caught.value).startswith("torch could not compute an expert on the CPU: ")
    assert re.search("size mismatch|shapes cannot be multiplied", str(caught.value))
    assert len(products.threads) == len(EVEN) * (3 if name == "mm_out" else 3 + 3 + 6), "the other slots are finished"


def test_sizes_that_do_not_fit_do_not_reach_bare_pointers() -> None:
    (rows, weights, w1, w3, w2), grad = inputs(EVEN, torch.float32)
    kept = (rows.new_empty(len(rows), F), rows.new_empty(len(rows), F))
    for broken in (
        (rows[:-1], weights[:-1], EVEN, w1, w3, w2),
        (rows, weights, EVEN[:-1], w1, w3, w2),
        (rows, weights, [*EVEN[:-1], -1], w1, w3, w2),
        (rows, weights[:-1], EVEN, w1, w3, w2),
        (rows, weights, EVEN, w1, w3[:, :-1].contiguous(), w2),
        (rows, weights, EVEN, w1, w3, w3),
        (rows, weights, EVEN, w1, w3, w2.bfloat16()),
        (rows, weights, EVEN, w1, w3, w2, (kept[0][:-1], kept[1])),
    ):
        with pytest.raises(AssertionError):
            kernels.swiglu_slots(*broken)
    for bad in (grad[:-1], grad.T.contiguous().T, grad.double()):
        with pytest.raises(AssertionError):
            kernels.swiglu_slots_backward(bad, rows, weights, EVEN, w1, w3, w2, *kept, (True,) * 3)


def test_weights_of_slots_without_rows_are_not_read() -> None:
    tensors, _ = inputs(WITH_EMPTY, torch.float32)
    rows, weights, *parameters = tensors
    expected = kernels.swiglu_slots(rows, weights, WITH_EMPTY, *parameters)
    for parameter in parameters:
        parameter[[0, 2, 5]] = torch.nan
    assert torch.equal(kernels.swiglu_slots(rows, weights, WITH_EMPTY, *parameters), expected)


@pytest.mark.parametrize(
    ("counts", "threads", "expected"),
    [
        ([4, 4, 4, 4], 2, ([0, 1, 2, 3], 0)),
        ([1, 9, 0, 2], 1, ([1, 3, 0, 2], 0)),
        ([2, 9, 3, 3], 2, ([1, 2, 3, 0], 0)),  # 9 beside 8
        ([4, 20, 4, 4, 4], 2, ([1, 0, 2, 3, 4], 1)),  # 20 is more than all others
        ([2, 12, 3, 3], 2, ([1, 2, 3, 0], 4)),  # 3 and 3 + 2 are not even enough either
        ([8] * 16, 16, (list(range(16)), 0)),
        ([8] * 8, 6, (list(range(8)), 2)),  # two by all threads, then six on six
        ([32] + [8] * 15, 4, (list(range(16)), 0)),
        ([0, 0, 7], 2, ([2, 0, 1], 1)),
        ([0, 0], 2, ([0, 1], 0)),
    ],
)
def test_slots_are_divided_so_that_threads_wait_little(
    counts: list[int], threads: int, expected: tuple[list[int], int]
) -> None:
    assert divide(counts, threads) == expected


def test_where_it_cannot_compute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def can(tensors: list[Tensor]) -> bool:
        return kernels.can_compute_swiglu_slots(*tensors)

    tensors, _ = inputs(EVEN, torch.float32)
    rows, weights, *parameters = tensors
    assert can(tensors) and can(inputs(EVEN, torch.bfloat16)[0])
    assert not can(inputs(EVEN, torch.float16)[0])
    assert not can([rows, weights.double(), *parameters])
    assert not can([rows.bfloat16(), weights, *parameters]), "two dtypes"
    assert not can([tensor.to("meta") for tensor in tensors])
    assert not can([rows.T.contiguous().T, weights, *parameters])
    assert not can([rows, weights.repeat_interleave(2)[::2], *parameters])
    assert not can([rows, weights, *parameters[:2], parameters[2].mT.contiguous().mT])
    with kernels.forced_kernels("torch"):
        assert not can(tensors)
    with FlopCounterMode(display=False):
        assert not can(tensors), "whoever counts operations must see them"
    with monkeypatch.context() as patch:
        patch.setattr(build, "library", lambda: None)
        assert not can(tensors)
    monkeypatch.setitem(torch_cpu.FUNCTIONS, "create", "not_in_this_build")
    torch_cpu.torch_cpu.cache_clear()
    try:
        assert not can(tensors) and not can(tensors)
        assert torch_cpu.obstacle() == "This build of torch has no functions for C++ to call."
        (record,) = caplog.records
        assert "not_in_this_build" in record.message and "more slowly" in record.message
    finally:
        torch_cpu.torch_cpu.cache_clear()
