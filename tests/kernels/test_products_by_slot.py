"""Who computes products by slot; what they are is among the cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe_kernels import forced_kernels, multiply_by_slot, multiply_pairs_by_slot, selection
from dynmoe_kernels import products_by_slot as module

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of `grouped_mm`."""
    found: list[int] = []
    real = F.grouped_mm
    monkeypatch.setattr(module.F, "grouped_mm", lambda *a, **k: found.append(1) or real(*a, **k))
    return found


@pytest.mark.parametrize(
    ("dtype", "width", "expected"), [(FLOAT32, 8, 2), (FLOAT32, 6, 0), (BFLOAT16, 12, 0), (FLOAT64, 8, 0)]
)
def test_on_a_cpu_aligned_sizes_take_grouped_mm_and_others_a_loop(calls, dtype, width, expected):
    rows = torch.ones(3, width, dtype=dtype)
    multiply_by_slot(rows, torch.ones(2, width, 16, dtype=dtype), ends([1, 2]))
    multiply_pairs_by_slot(torch.ones(3, 16, dtype=dtype), rows, ends([1, 2]))
    assert len(calls) == expected


def test_strides_that_grouped_mm_refuses_take_a_loop(calls):
    """Every second column, one row for all, and rows that begin after 36 bytes."""
    wide = torch.randn(3, 16)
    operands = [wide[:, ::2], wide[:1, :8].expand(3, 8), torch.randn(3, 9)[:, :8]]
    matrices = torch.randn(2, 8, 4)
    for rows in operands:
        got = multiply_by_slot(rows, matrices, ends([1, 2]))
        assert torch.allclose(got, torch.cat([rows[:1] @ matrices[0], rows[1:] @ matrices[1]]), atol=1e-6)
    assert not calls


class OnAGPU:
    """What the choice looks at of a tensor on a GPU that this machine need not have."""

    def __init__(self, dtype: torch.dtype, *shape: int, address: int = 0) -> None:
        self.dtype, self.shape, self.device, self.address = dtype, shape, torch.device("cuda", 0), address

    def __len__(self) -> int:
        return self.shape[0]

    def stride(self) -> tuple[int, ...]:
        return torch.empty(self.shape, device="meta").stride()

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        return self.address

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def chosen(
    dtype: torch.dtype, *, width: int = 64, num_rows: int = 10, num_slots: int = 3, address: int = 0
) -> set[str]:
    """Who computes both products of operands of these sizes."""
    rows: Any = OnAGPU(dtype, num_rows, width, address=address)
    others: tuple[Any, ...] = (OnAGPU(dtype, num_slots, width, 32), OnAGPU(dtype, num_rows, 32))
    slot_ends: Any = OnAGPU(torch.int32, num_slots)
    kernel = {module._take_triton(rows, other, slot_ends) for other in others}
    fits = {module._fits_grouped_mm(rows, other, 32) for other in others}
    return {"kernel" if k else "grouped_mm" if f else "loop" for k in kernel for f in fits}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Sets the GPU: its compute capability, whether it is AMD's, whether there is Triton."""

    def clear() -> None:
        selection._device_obstacle.cache_clear()
        module._has_grouped_kernel.cache_clear()

    def be(capability: tuple[int, int], *, is_amd: bool = False, has_triton: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.version, "hip", "7.0" if is_amd else None)
        monkeypatch.setattr(selection, "_why_no_triton", lambda: None if has_triton else "No module named 'triton'")
        clear()

    monkeypatch.delenv(selection.VARIABLE, raising=False)
    yield be
    clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((9, 0), BFLOAT16, "grouped_mm"),
        ((10, 0), BFLOAT16, "grouped_mm"),
        ((10, 3), BFLOAT16, "grouped_mm"),
        ((9, 0), FLOAT16, "kernel"),
        ((9, 0), FLOAT32, "kernel"),
        ((8, 0), BFLOAT16, "kernel"),
        ((8, 0), FLOAT32, "kernel"),
        ((8, 6), FLOAT16, "kernel"),
        ((8, 9), BFLOAT16, "kernel"),
        ((11, 0), BFLOAT16, "kernel"),
        ((12, 0), BFLOAT16, "kernel"),
        ((7, 5), FLOAT16, "grouped_mm"),
        ((9, 0), FLOAT64, "loop"),
    ],
)
def test_grouped_mm_computes_where_it_has_a_kernel(gpu, capability, dtype, expected):
    gpu(capability)
    assert chosen(dtype) == {expected}


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32])
def test_the_kernel_computes_on_amds_gpus(gpu, dtype):
    gpu((9, 4), is_amd=True)
    assert chosen(dtype) == {"kernel"}


@pytest.mark.parametrize(
    "what", [{"width": 60}, {"address": 8}, {"num_slots": 1024}, {"num_rows": 0}], ids=lambda what: next(iter(what))
)
def test_the_kernel_computes_what_grouped_mm_does_not_take(gpu, what):
    gpu((9, 0))
    assert chosen(BFLOAT16, **what) == {"kernel"}
    assert chosen(BFLOAT16, num_slots=1023, address=32) == {"grouped_mm"}


def test_without_triton_torch_computes(gpu):
    gpu((8, 0), has_triton=False)
    assert chosen(BFLOAT16) == {"grouped_mm"}
    assert chosen(BFLOAT16, address=8) == {"loop"}


@pytest.mark.parametrize(("choice", "expected"), [("triton", "kernel"), ("torch", "grouped_mm")])
def test_either_can_be_forced(gpu, choice, expected):
    gpu((9, 0))
    with forced_kernels(choice):
        assert chosen(BFLOAT16) == chosen(FLOAT32) == {expected}


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch):
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


def test_float32_is_multiplied_as_torch_is_told(tf32, monkeypatch):
    pytest.importorskip("triton")
    from dynmoe_kernels.jit.products_by_slot import product_precision

    tf32.fp32_precision = "ieee"
    assert product_precision(FLOAT32) == "tf32x3"
    tf32.fp32_precision = "tf32"
    assert product_precision(FLOAT32) == "tf32"
    assert product_precision(BFLOAT16) == product_precision(FLOAT16) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert product_precision(FLOAT32) == "ieee"


def test_tiles_are_as_many_as_rows_can_need():
    """Against every way to share out up to 9 rows among 3 slots."""
    pytest.importorskip("triton")
    from dynmoe_kernels.jit.products_by_slot import most_tiles

    for num_rows in range(10):
        shares = [(a, b, num_rows - a - b) for a in range(num_rows + 1) for b in range(num_rows + 1 - a)]
        for block in (1, 2, 4):
            needed = max(sum(-(-rows // block) for rows in share) for share in shares)
            assert most_tiles(num_rows, 3, block) == needed, (num_rows, block)
