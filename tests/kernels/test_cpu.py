"""The functions in C++ for CPUs: what they compute, who chooses them, and what happens where none are compiled."""

from __future__ import annotations

import logging
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Iterator
from math import isnan
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dynmoe_kernels as kernels
from dynmoe_ds.experts import build_experts
from dynmoe_kernels.cpu import build
from tests.helpers.reference import ACTIVATIONS
from tests.kernels.cases import Draw, assert_rounded_once, by_autograd, check_gates

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_library_yet() -> Iterator[None]:
    """As in a process that has not looked for the library."""
    for function in (build.library, build._load):
        function.cache_clear()
    yield
    for function in (build.library, build._load):
        function.cache_clear()


def inputs(dtype: torch.dtype, num_rows: int, width: int) -> tuple[Tensor, ...]:
    """gate, up, the gradient of the product [n, F], and weights [n]."""
    draw = Draw("cpu", dtype)
    gate, up, grad = (scale * draw(num_rows, width) for scale in (3, 1, 1))
    return gate, up, grad, torch.rand(num_rows, generator=torch.Generator().manual_seed(1))


def run(gate: Tensor, up: Tensor, grad: Tensor, weights: Tensor) -> list[Tensor]:
    """The product, then gradients of gate, up and weights: of one slot, whose matrices pick gate and up from rows."""
    width = gate.shape[1]
    first, second = torch.eye(2 * width, dtype=gate.dtype).view(2, 1, width, 2 * width)
    parameters = (first, second, first.transpose(1, 2).contiguous())
    rows = torch.cat([gate, up], 1)
    kept = (torch.empty_like(gate), torch.empty_like(gate))
    out = kernels.swiglu_slots(rows, weights, [len(gate)], *parameters, kept=kept)
    assert all(torch.equal(*pair) for pair in zip(kept, (gate, up), strict=True))
    grads, grad_weights, *_ = kernels.swiglu_slots_backward(
        torch.cat([grad, torch.zeros_like(grad)], 1), rows, weights, [len(gate)], *parameters, *kept, (False,) * 3
    )
    return [out[:, :width], *grads.split(width, 1), grad_weights]


@pytest.mark.parametrize("width", [1, 7, 64, 1031])
@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_between_the_products_is_rounded_once(dtype: torch.dtype, num_rows: int, width: int) -> None:
    """One and several threads."""
    gate, up, grad, weights = inputs(dtype, num_rows, width)
    wanted = by_autograd(lambda a, b, w: ACTIVATIONS["silu"](a) * b * w[:, None], grad, gate, up, weights)
    names = ("product", "grad_gate", "grad_up", "grad_weights")
    for name, got, want in zip(names, run(gate, up, grad, weights), wanted, strict=True):
        assert_rounded_once(got, want, name)
        nearest = want.to(dtype) == got
        assert got.dtype == torch.float32 or nearest.double().mean() > 0.99, f"{name} is not rounded to nearest"


def of_value(gate: float, up: float, grad: float, weight: float, dtype: torch.dtype) -> list[float]:
    """The product, gradients of gate, up and weight for one row of one number, whatever that is."""
    parameters = [torch.tensor([[[value, 0.0]]], dtype=dtype) for value in (gate, 0.0)]
    parameters[1][0, 0, 1] = up
    rows, weights = torch.ones(1, 2, dtype=dtype), torch.tensor([weight])
    w2, grads = torch.tensor([[[1.0], [0.0]]], dtype=dtype), torch.tensor([[grad, 0.0]], dtype=dtype)
    kept = (torch.empty(1, 1, dtype=dtype), torch.empty(1, 1, dtype=dtype))
    out = kernels.swiglu_slots(rows, weights, [1], *parameters, w2, kept=kept)
    _, grad_weights, grad1, grad3, _ = kernels.swiglu_slots_backward(
        grads, rows, weights, [1], *parameters, w2, *kept, (True, True, False)
    )
    return [out[0, 0].item(), grad1[0, 0, 0].item(), grad3[0, 0, 0].item(), grad_weights.item()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values_come_out_as_from_torch(dtype: torch.dtype) -> None:
    """Also NaN, whose rounding to 16 bits could become a number."""
    for value in (0.0, -0.0, 1e-30, -60.0, 60.0, -200.0, 200.0, 3e38, -3e38):
        exact = torch.tensor(value, dtype=dtype)
        wanted = torch.nn.functional.silu(exact.double()).item()
        product, *_ = of_value(exact.item(), 1.0, 1.0, 1.0, dtype)
        assert abs(product - wanted) <= 1e-2 * abs(wanted) + 1e-30
    nan, inf = float("nan"), float("inf")
    for position, broken in enumerate(((nan, 1.0, 1.0), (1.0, nan, 1.0), (1.0, 1.0, nan))):
        product, grad_gate, grad_up, grad_weight = of_value(*broken, 1.0, dtype)
        assert isnan(product) == (position != 2)
        assert isnan(grad_gate) and isnan(grad_weight)
        assert isnan(grad_up) == (position != 1)
    all_ones = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
    assert isnan(all_ones) and all(map(isnan, of_value(1.0, 1.0, 1.0, all_ones, dtype)[:3]))
    assert of_value(inf, 1.0, 1.0, 1.0, dtype)[0] == inf


def test_ties_go_to_the_even_neighbour() -> None:
    """silu(64) is 64 in float32; bfloat16 has a step of 2^-7 at 1."""
    for weight, wanted in ((1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6)):
        assert of_value(64.0, 1.0, 1.0, weight, torch.bfloat16)[0] == 64 * wanted


def test_a_library_is_compiled_once_and_found_again(
    no_library_yet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}")
    script = "from dynmoe_kernels.cpu.build import library; assert library() is not None"
    ranks = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    (file,) = (tmp_path / "dynmoe_ds").iterdir()
    made = file.stat().st_mtime_ns
    assert build.library() is not None and file.stat().st_mtime_ns == made
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    build._load.cache_clear()
    assert build.obstacle() is None and len(list(file.parent.iterdir())) == 2


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a processor of that kind")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_scores_on_processors_without_avx512(
    dtype: torch.dtype, no_library_yet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles have another shape there."""
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}")
    flags = ["-march=x86-64-v3" if flag == "-march=native" else flag for flag in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", flags)
    for width, num_slots in ((16, 3), (48, 19), (544, 33)):
        check_gates("cpu", dtype, 70, width, num_slots, is_transposed=False)
    assert b"zmm" not in subprocess.check_output(["objdump", "-d", *(tmp_path / "dynmoe_ds").iterdir()])


def broken_compiler(folder: Path) -> Path:
    compiler = folder / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no such flag" >&2; exit 1; }\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return compiler


@pytest.mark.parametrize("case", ["no compiler", "a broken one", "no folder to write to"])
def test_without_a_library_torch_computes_and_the_log_says_why(
    case: str, no_library_yet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}")
    match case:
        case "no compiler":
            monkeypatch.delenv("CXX", raising=False)
            monkeypatch.setenv("PATH", f"{tmp_path}")
            reason = "There is no C++ compiler (g++)."
        case "a broken one":
            monkeypatch.setenv("CXX", f"{broken_compiler(tmp_path)}")
            reason = f"The functions for CPUs cannot be compiled by {tmp_path}/broken: no such flag."
        case _:
            (tmp_path / "dynmoe_ds").write_text("a file in the folder's place")
            reason = "File exists"
    experts = build_experts("swiglu", 2, 8, 4)
    rows, counts = torch.ones(3, 8), torch.tensor([1, 2])
    with caplog.at_level(logging.WARNING):
        found = [experts(rows, torch.ones(3), counts) for _ in range(2)]
    assert [record.levelname for record in caplog.records] == ["WARNING"], "once"
    assert reason in caplog.text and "Plain torch computes on this CPU" in caplog.text
    assert reason in str(build.obstacle())
    with kernels.forced_kernels("torch"):
        assert torch.equal(found[0], experts(rows, torch.ones(3), counts))
    assert not [path for path in (tmp_path / "dynmoe_ds").glob("*") if os.path.isdir(path)], "nothing is left aside"
