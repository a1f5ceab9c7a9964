"""Products of tokens with gate rows: those of torch, whoever computes them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from dynmoe_ds.routing import build_router
from dynmoe_ds.routing.logits import gate_logits
from dynmoe_kernels import forced_kernels

MODULE: Any = import_module("dynmoe_ds.routing.logits")
IN_CPP: Any = import_module("dynmoe_kernels.cpu.gate_scores")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions in C++ that were called."""
    names: list[str] = []
    run = IN_CPP._run

    def note(name: str, *arguments: Any, **keywords: Any) -> None:
        names.append(name)
        run(name, *arguments, **keywords)

    monkeypatch.setattr(IN_CPP, "_run", note)
    return names


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("of_rows", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_hidden", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [MODULE._FEW_TOKENS - 1, MODULE._FEW_TOKENS])
def test_value_and_gradients(num_tokens: int, of_hidden: torch.dtype, of_rows: torch.dtype, calls: list[str]) -> None:
    hidden, rows = draw(num_tokens, 48, seed=0, dtype=of_hidden), draw(5, 48, seed=1, dtype=of_rows)
    grad = draw(5, num_tokens, seed=2).T  # not contiguous
    given = [hidden.requires_grad_(), rows.requires_grad_()]
    logits = gate_logits(*given)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = wide[0] @ wide[1].T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(logits, given, grad)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for gradient, want, tensor in zip(gradients, wanted, given, strict=True):
        assert gradient.dtype == tensor.dtype
        last_place = 2**-7 if tensor.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(gradient.double(), want, rtol=last_place, atol=1e-4)
    assert calls == (["gate_scores", "gate_scores_backward"] if num_tokens >= MODULE._FEW_TOKENS else [])


def test_float64_stays_float64() -> None:
    hidden, rows = draw(2000, 16, seed=0).double(), draw(3, 16, seed=1)
    torch.testing.assert_close(gate_logits(hidden, rows), hidden @ rows.double().T)


def test_a_frozen_gate_costs_no_gradient() -> None:
    hidden, rows = draw(2000, 16, seed=0).requires_grad_(), draw(3, 16, seed=1)
    (gradient,) = torch.autograd.grad(gate_logits(hidden, rows).sum(), hidden)
    torch.testing.assert_close(gradient, rows.sum(0).expand(2000, 16))


@pytest.mark.parametrize("name", ["top_k", "top_p", "relu", "expert_threshold", "top_any_recommended", "top_any"])
def test_routers_route_as_with_torch(name: str, calls: list[str]) -> None:
    """A batch large enough for C++, in the mask, the weights and their gradients."""
    active, grad = torch.ones(8, dtype=torch.bool), draw(2000, 8, seed=2)

    def route() -> tuple[Tensor, ...]:
        hidden = draw(2000, 64, seed=0, dtype=torch.bfloat16).requires_grad_()
        router = build_router(name, 64, 8)
        router.initialize(8, seed=0)
        with torch.no_grad():
            router.weight.copy_(torch.nn.functional.normalize(draw(8, 64, seed=1), dim=1))
        routing = router(hidden, active, None)
        (routing.weights * grad).sum().backward()
        return routing.mask, routing.weights.detach(), router.weight.grad, hidden.grad

    mask, weights, *gradients = route()
    assert calls == ["gate_scores", "gate_scores_backward"]
    with forced_kernels("torch"):
        expected = route()
    assert (mask == expected[0]).double().mean() > 0.999 and 0 < mask.double().mean() < 1
    same = (mask == expected[0]).all(1)
    torch.testing.assert_close(weights[same], expected[1][same], rtol=1e-4, atol=1e-5)
    for gradient, want in zip(gradients, expected[2:], strict=True):
        assert (gradient - want).norm() < 1e-2 * want.norm()
