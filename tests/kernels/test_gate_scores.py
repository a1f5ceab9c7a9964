"""Scores of tokens against gate rows in C++: what they are, their gradients, and where they cannot be computed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

import dynmoe_kernels as kernels
from tests.kernels.cases import Draw, assert_rounded_once, check_gates

MODULE: Any = import_module("dynmoe_kernels.cpu.gate_scores")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of C++ that were called."""
    names = []
    run = MODULE._run

    def note(name: str, *arguments: Any, **keywords: Any) -> None:
        names.append(name)
        run(name, *arguments, **keywords)

    monkeypatch.setattr(MODULE, "_run", note)
    return names


@pytest.mark.parametrize(("width", "num_slots"), [(16, 3), (48, 8), (64, 19), (272, 33), (544, 64)])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 70, 333])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype, num_tokens: int, width: int, num_slots: int, calls: list[str], threads: int) -> None:
    """Whole tiles and parts of one, in every direction."""
    check_gates("cpu", dtype, num_tokens, width, num_slots, is_transposed=False)
    assert calls == ["gate_scores", "gate_scores_backward"]


@pytest.mark.parametrize(("width", "num_slots"), [(16, 1), (272, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype, width: int, num_slots: int, threads: int) -> None:
    draw = Draw("cpu", dtype)
    hidden, rows, grad = draw(70, width), draw(num_slots, width).float(), draw(70, num_slots).float()
    scores = kernels.gate_scores(hidden, rows)
    assert_rounded_once(scores, hidden.double() @ rows.double().T, "scores")
    wanted = [grad.double() @ rows.double(), grad.double().T @ hidden.double()]
    for wants in ((True, True), (False, True), (True, False)):
        found = kernels.gate_scores_backward(grad, hidden, rows, None, wants)
        assert [gradient is not None for gradient in found] == list(wants)
        for gradient, want, narrow in zip(found, wanted, (dtype, torch.float32), strict=True):
            if gradient is not None:
                assert gradient.dtype == narrow
                assert_rounded_once(gradient, want, f"{wants}")


def test_scores_of_a_token_do_not_depend_on_the_others() -> None:
    draw = Draw("cpu", torch.bfloat16)
    hidden, rows = draw(70, 64), draw(19, 64).float()
    whole, _ = kernels.gate_cosines(hidden, rows)
    for part in (slice(3, 4), slice(5, 50), slice(33, 70)):
        assert torch.equal(kernels.gate_cosines(hidden[part], rows)[0], whole[part])


def test_sums_of_many_terms_keep_their_precision() -> None:
    """2^16 terms added one after another end at 6557.6."""
    num_terms = 1 << 16
    hidden, rows = torch.ones(1, num_terms), torch.full((1, num_terms), 0.1)
    (score,) = kernels.gate_scores(hidden, rows).flatten().tolist()
    assert score == pytest.approx(0.1 * num_terms, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_token(dtype: torch.dtype) -> None:
    hidden, rows = torch.ones(40, 32, dtype=dtype), torch.ones(3, 32)
    hidden[7, 3], hidden[20, 5] = torch.nan, torch.inf
    scores = kernels.gate_scores(hidden, rows)
    assert scores[7].isnan().all() and scores[20].isposinf().all()
    others = torch.ones(40, dtype=torch.bool)
    others[[7, 20]] = False
    assert (scores[others] == 32).all()
    grad = torch.ones(40, 3)
    grad[9, 1] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN that rounding could make a number
    grad_hidden, _ = kernels.gate_scores_backward(grad, hidden, rows, None, (True, False))
    others[9], others[[7, 20]] = False, True  # the gradient of a product does not depend on its own factor
    assert grad_hidden[9].isnan().all() and (grad_hidden[others] == 3).all()


def test_what_it_computes() -> None:
    can = kernels.can_compute_gate_scores
    hidden, rows = torch.ones(4, 32), torch.ones(3, 32)
    assert can(hidden, rows) and can(hidden.bfloat16(), rows)
    assert not can(hidden.half(), rows) and not can(hidden.double(), rows)
    assert not can(hidden, rows.double()) and not can(hidden.bfloat16(), rows.bfloat16())
    assert not can(hidden[:, :24].contiguous(), rows[:, :24].contiguous()), "a width between two vectors"
    assert not can(hidden.T.contiguous().T, rows) and not can(hidden, rows.T.contiguous().T)
    assert can(hidden, torch.ones(128, 32)) and not can(hidden, torch.ones(129, 32)), "torch is as fast"
    assert not can(hidden.to("meta"), rows.to("meta"))
    with kernels.forced_kernels("torch"):
        assert not can(hidden, rows)


def test_sizes_are_checked_before_they_become_pointers() -> None:
    hidden, rows = torch.ones(4, 32), torch.ones(3, 32)
    scores, lengths = kernels.gate_cosines(hidden, rows)
    both = (True, True)
    for wrong in (scores[:3], scores.double()):
        with pytest.raises(AssertionError, match="grad"):
            kernels.gate_scores_backward(wrong, hidden, rows, (scores, lengths), both)
    with pytest.raises(AssertionError, match="rows"):
        kernels.gate_scores(hidden, torch.ones(3, 48))
    with pytest.raises(AssertionError, match="scores"):
        kernels.gate_scores_backward(scores, hidden, rows, (scores.T.contiguous().T, lengths), both)
    with pytest.raises(AssertionError, match="lengths"):
        kernels.gate_scores_backward(scores, hidden, rows, (scores, lengths[:2]), both)


def test_a_gradient_of_any_strides() -> None:
    hidden, rows, grad = torch.ones(4, 32), torch.ones(3, 32), Draw("cpu", torch.float32)(3, 4)
    cosines = kernels.gate_cosines(hidden, rows)
    found = [kernels.cosine_scores_backward(g, hidden, rows, *reversed(cosines)) for g in (grad.T, grad.T.contiguous())]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_failure_of_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: 1)
    found = MODULE.torch_cpu()
    address = ctypes.cast(fails, ctypes.c_void_p).value
    broken = found._replace(functions=found.functions | {"parallel_for": address})
    monkeypatch.setattr(MODULE, "torch_cpu", lambda: broken)
    with pytest.raises(RuntimeError, match="gate scores on the CPU"):
        kernels.gate_scores(torch.ones(4, 32), torch.ones(3, 32))
