"""The functions in C++ for CPUs: what they compute, who chooses them, and what happens where none are compiled."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dynmoe_kernels as kernels
from dynmoe_kernels.cpu import build
from tests.helpers.reference import ACTIVATIONS
from tests.kernels.cases import Draw, assert_rounded_once, by_autograd

ROOT = Path(__file__).parents[2]
OPERATION = import_module("dynmoe_kernels.cpu.weighted_swiglu")


@pytest.fixture
def no_library_yet() -> Iterator[None]:
    """As in a process that has not looked for the library."""
    for function in (build.library, build._load):
        function.cache_clear()
    yield
    for function in (build.library, build._load):
        function.cache_clear()


def inputs(dtype: torch.dtype, num_rows: int, width: int) -> tuple[Tensor, ...]:
    """gate, up, the gradient of the product [n, F], as parts of longer rows, and weights [n]."""
    draw = Draw("cpu", dtype)
    gate, up, grad = ((scale * draw(num_rows, width + 3))[:, :width] for scale in (3, 1, 1))
    return gate, up, grad, torch.rand(num_rows, generator=torch.Generator().manual_seed(1))


def run(gate: Tensor, up: Tensor, grad: Tensor, weights: Tensor) -> list[Tensor]:
    """The product, then gradients of gate, up and weights, and the product once more."""
    backward = kernels.weighted_gated_backward(grad, gate, up, weights, "silu", with_product=True)
    return [kernels.weighted_gated(gate, up, weights, "silu"), *(found for found in backward if found is not None)]


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("width", [1, 7, 64, 1031])
@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_compute_the_formula(
    dtype: torch.dtype,
    num_rows: int,
    width: int,
    choice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` in C++, one and several threads, and `torch` without it."""
    calls = []
    call = OPERATION._call
    monkeypatch.setattr(OPERATION, "_call", lambda *args: (calls.append(args[0]), call(*args)))
    gate, up, grad, weights = inputs(dtype, num_rows, width)
    product, grad_gate, grad_up, grad_weights = by_autograd(
        lambda a, b, w: ACTIVATIONS["silu"](a) * b * w[:, None], grad, gate, up, weights
    )
    with kernels.forced_kernels(choice):
        found = run(gate, up, grad, weights)
    assert sorted(calls) == (["weighted_swiglu", "weighted_swiglu_backward"] if choice == "auto" else [])
    names = ("product", "grad_gate", "grad_up", "grad_weights", "product once more")
    for name, got, want in zip(names, found, (product, grad_gate, grad_up, grad_weights, product), strict=True):
        assert_rounded_once(got, want, name)
        nearest = want.to(dtype) == got
        assert got.dtype == torch.float32 or nearest.double().mean() > 0.99, f"{name} is not rounded to nearest"


def test_float64_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPERATION, "_call", lambda *_: pytest.fail("C++ knows no float64"))
    gate, up, grad, _ = inputs(torch.float64, 5, 9)
    weights = torch.rand(5, dtype=torch.float64)
    want = by_autograd(lambda a, b, w: ACTIVATIONS["silu"](a) * b * w[:, None], grad, gate, up, weights)
    product, grad_gate, grad_up, grad_weights, _ = run(gate, up, grad, weights)
    for got, expected in zip((product, grad_gate, grad_up, grad_weights), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values_come_out_as_from_torch(dtype: torch.dtype) -> None:
    """Also NaN of every bit pattern, whose rounding could become a number."""
    values = torch.tensor([0.0, -0.0, 1e-30, -60.0, 60.0, -200.0, 200.0, 3e38, -3e38]).to(dtype)
    gate = values[None].contiguous()
    up, weights = torch.ones_like(gate), torch.ones(1)
    product, *_ = run(gate, up, up, weights)
    wanted = torch.nn.functional.silu(gate.double())
    assert ((product.double() - wanted).abs() <= 1e-2 * wanted.abs() + 1e-30).all()
    bits = torch.tensor([[-1, 0x7F800001, 0x7FFFFFFF, 0x7FC00000]], dtype=torch.int32)
    broken = bits.view(torch.float32) if dtype == torch.float32 else (bits >> 16 | 1).to(torch.int16).view(dtype)
    assert broken.isnan().all()
    ones = torch.ones_like(broken)
    for gate, up, grad in ((broken, ones, ones), (ones, broken, ones), (ones, ones, broken)):
        product, grad_gate, grad_up, grad_weights, _ = run(gate, up, grad, weights)
        assert product.isnan().all() == (grad is not broken)
        assert grad_gate.isnan().all() and grad_weights.isnan().all()
        assert grad_up.isnan().all() == (up is not broken)
    weight = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    assert all(found.isnan().all() for found in run(ones, ones, ones, weight)[:3])
    infinite = torch.full((1, 4), torch.inf, dtype=dtype)
    assert run(infinite, torch.ones_like(infinite), torch.ones_like(infinite), weights)[0].isinf().all()


def test_other_shapes_do_not_reach_bare_pointers() -> None:
    gate, up, _, weights = inputs(torch.float32, 5, 9)
    with pytest.raises(AssertionError):
        OPERATION.weighted_swiglu_cpp(gate, up, weights, torch.empty(5, 8))
    with pytest.raises(AssertionError):
        OPERATION.weighted_swiglu_cpp(gate, up, weights[:4], torch.empty(5, 9))


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
    with caplog.at_level(logging.WARNING):
        found = [run(*inputs(torch.float32, 5, 9)) for _ in range(2)]
    assert [record.levelname for record in caplog.records] == ["WARNING"], "once"
    assert reason in caplog.text and "Plain torch computes experts" in caplog.text
    assert reason in str(build.obstacle())
    with kernels.forced_kernels("torch"):
        for got, want in zip(found[0], run(*inputs(torch.float32, 5, 9)), strict=True):
            assert torch.equal(got, want)
    assert not [path for path in (tmp_path / "dynmoe_ds").glob("*") if os.path.isdir(path)], "nothing is left aside"
