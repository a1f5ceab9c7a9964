"""The dispatch plan in C++: the twin's plan for every mask, divided among threads or not, and when it is not asked."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import dynmoe_kernels as kernels
from dynmoe_kernels import PlanIndices
from dynmoe_kernels.plan import plan_torch
from tests.kernels.cases import check_plan

MODULE: Any = import_module("dynmoe_kernels.cpu.plan")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts each plan in C++ had."""
    parts = []
    run = MODULE._run

    def note(name: str, call: Any) -> None:
        if name == "plan_fill":
            parts.append(call.parts)
        run(name, call)

    monkeypatch.setattr(MODULE, "_run", note)
    return parts


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_mask(num_tokens: int, num_slots: int, share: float) -> Tensor:
    draws = torch.rand(num_tokens, num_slots, generator=torch.Generator().manual_seed(num_tokens + num_slots))
    return draws < share


def assert_equal(got: PlanIndices, wanted: PlanIndices) -> None:
    for name in PlanIndices.__dataclass_fields__:
        assert getattr(got, name).dtype == torch.int64, name
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize("num_slots", [1, 7, 8, 9, 16, 129])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_small_masks(num_tokens: int, num_slots: int, share: float, calls: list[int]) -> None:
    check_plan("cpu", random_mask(num_tokens, num_slots, share), None)
    assert calls == [1]


@pytest.mark.parametrize(("num_tokens", "num_slots"), [(4096 + 1, 16), (20 * 1000 + 3, 9), (1000, 700)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_parts_of_a_mask_follow_each_other(
    num_tokens: int, num_slots: int, share: float, calls: list[int], threads: int
) -> None:
    """Also where the last part has fewer tokens."""
    mask = random_mask(num_tokens, num_slots, share)
    assert_equal(kernels.plan(mask, None), plan_torch(mask, None))
    assert calls == [min(threads, mask.numel() // MODULE._PAIRS_PER_PART)]


def test_more_parts_than_tokens(calls: list[int], monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(MODULE, "_PAIRS_PER_PART", 1)
    mask = random_mask(3, 50, 0.5)
    assert_equal(kernels.plan(mask, None), plan_torch(mask, None))
    assert calls == [threads]


def test_a_mask_that_is_a_view(calls: list[int]) -> None:
    """Contiguous ones that begin inside of a larger tensor are planned in C++, others by torch."""
    mask = random_mask(30, 12, 0.3)
    assert_equal(kernels.plan(mask[3:20], None), plan_torch(mask[3:20].clone(), None))
    assert len(calls) == 1
    for view in (mask[:, 2:9], mask.T):
        assert_equal(kernels.plan(view, None), plan_torch(view.clone(), None))
    assert len(calls) == 1


def test_torch_plans_where_it_was_chosen(calls: list[int]) -> None:
    with kernels.forced_kernels("torch"):
        kernels.plan(random_mask(30, 12, 0.3), None)
    assert calls == []


@pytest.mark.parametrize("num_tokens", [0, 30])
def test_torch_plans_where_there_is_another_number_of_rows_than_of_pairs(num_tokens: int, calls: list[int]) -> None:
    mask = random_mask(num_tokens, 12, 0.3)
    num_pairs = int(mask.sum())
    assert_equal(kernels.plan(mask, num_pairs), plan_torch(mask, num_pairs))
    assert calls == [1]
    for num_rows in {max(num_pairs - 3, 0), num_pairs + 5} - {num_pairs}:
        assert_equal(kernels.plan(mask, num_rows), plan_torch(mask, num_rows))
    assert calls == [1]


def test_failing_threads_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        plan_count = staticmethod(lambda call: 1)

    monkeypatch.setattr(MODULE.build, "library", lambda: Failing)
    with pytest.raises(RuntimeError, match="torch could not compute a dispatch plan"):
        MODULE.plan_cpu(random_mask(3, 4, 0.5), None)
