"""NaN and infinity on one rank: all ranks report the same, nothing is updated, and the step can be left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dynmoe_ds as dm
from dynmoe_ds.engine.snapshot import COUNTERS, take_snapshot
from dynmoe_ds.errors import NonFiniteError
from tests.helpers.models import TinyModel, batch, deepspeed_config, shard
from tests.helpers.spawn import run_ranks

ACCUMULATE = 2
CONFIGS = [(stage, bf16) for stage in (0, 1, 2, 3) for bf16 in (False, True)]
NAN, INF = float("nan"), float("inf")

# Steps in order, each with what goes wrong in its first micro step on rank 1.
FAULTS: list[tuple[str, float] | None] = [
    None,
    ("loss", NAN),
    None,
    ("input", INF),
    ("gradient", -INF),
    None,
    ("gradient", NAN),
    None,
]
WHERE = {
    "loss": "the loss.",
    "input": "the input of moe.1, so what comes before that layer made it.",
    "gradient": "the gradient of moe.0.experts.w3.",
}


class FaultyModel(TinyModel):
    """A `TinyModel` that `fault` spoils: its loss, the input of its second layer, or an expert's gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fault: tuple[str, float] | None = None
        self.moe[0].experts.w3.register_hook(self.spoil_gradient)

    def spoil_gradient(self, grad: Tensor) -> Tensor | None:
        if self.fault is None or self.fault[0] != "gradient":
            return None
        grad = grad.clone()
        grad.view(-1)[5] = self.fault[1]
        return grad

    def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        kind, value = self.fault or ("", 0.0)
        h = self.first(x)
        for i, layer in enumerate(self.moe):
            if kind == "input" and i == 1:
                h = h + torch.zeros_like(h).index_fill(0, torch.tensor([3]), value)
            h = h + layer(h)
        error = (self.last(h).float() - y.float()).square().mean()
        return error * value if kind == "loss" else error + value if kind == "huge loss" else error


def make(stage: int, bf16: bool = False, world_size: int = 2, **kwargs: Any) -> Any:
    return dm.initialize(
        FaultyModel(min(world_size, 2), router="top_any_budget"),
        deepspeed_config(stage, bf16=bf16, accumulate=ACCUMULATE, clip=1.0),
        # Due after steps 2, 4, 6 and 8, of which the first two are spoilt.
        adaptation=dm.AdaptationConfig(every_steps=2, window_steps=2, rule="split_strained"),
        **kwargs,
    )


def take_step(engine: Any, step: int, rank: int, world_size: int, fault: tuple[str, float] | None = None) -> None:
    dtype = next(engine.module.parameters()).dtype
    for micro in range(ACCUMULATE):
        engine.module.fault = fault if (micro, rank) == (0, world_size - 1) else None
        x, y = shard(batch(step * ACCUMULATE + micro, 32, dtype), rank, world_size)
        engine.backward(engine(x, y))
        engine.module.fault = None
        engine.step()


def state_of(engine: Any) -> dict[str, Any]:
    """All that a checkpoint would hold but random numbers, flat. Collective: every rank."""
    snapshot = take_snapshot(engine, None)
    own = {key: value for key, value in snapshot.own.items() if key != "rng"}
    flat = dict(_flat("", {"tensors": snapshot.tensors, "shared": snapshot.shared, "own": own}))
    return flat | {"norm": engine.gradient_norm(), "loads": engine.last_loads()}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}", item)
    else:
        yield prefix, value


def differing(a: dict[str, Any], b: dict[str, Any], *ignored: str) -> list[str]:
    assert a.keys() == b.keys()
    same = {
        key: torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key] for key, value in a.items()
    }
    return [key for key, is_same in same.items() if not is_same and key not in ignored]


def count_a_step(engine: Any) -> None:
    """What leaving out a step must amount to, to an engine that never saw its batch."""
    counters = {name: getattr(engine, name) for name in COUNTERS}
    config = engine._deepspeed
    counters["global_steps"] += 1
    counters["skipped_steps"] += 1
    counters["global_samples"] += config.train_batch_size()
    counters["micro_steps"] += ACCUMULATE
    engine.set_counters(counters)
    if engine._window.is_due(engine.global_steps):
        engine._adapt()


def stop_and_skip(rank: int, world_size: int, stage: int, bf16: bool) -> dict[str, Any]:
    never, skip = make(stage, bf16, world_size), make(stage, bf16, world_size, on_non_finite="skip_step")
    stop = make(stage, bf16, world_size)
    out: dict[str, Any] = {"errors": {}, "changed": {}, "unlike": {}, "events": []}
    for step, fault in enumerate(FAULTS):
        take_step(skip, step, rank, world_size, fault)
        if fault is None:
            take_step(never, step, rank, world_size)
            take_step(stop, step, rank, world_size)
        else:
            before = state_of(stop)
            try:
                take_step(stop, step, rank, world_size, fault)
            except NonFiniteError as error:
                out["errors"][step] = f"{error}"
            out["changed"][step] = differing(before, state_of(stop))
            count_a_step(stop)
            count_a_step(never)
        wanted = state_of(never)
        ignored = ("norm", "loads") if fault is not None else ()
        out["unlike"][step] = [
            *differing(wanted, state_of(skip), *ignored),
            *differing(wanted, state_of(stop), *ignored),
        ]
    out["events"] = [len(engine.take_events()) for engine in (never, skip, stop)]
    out["skipped"] = skip.skipped_steps
    return out


def all_of(rank: int, world_size: int) -> dict[Any, Any]:
    return {config: stop_and_skip(rank, world_size, *config) for config in CONFIGS}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[Any, Any]]:
    return run_ranks(all_of, 2, timeout_s=120)


@pytest.mark.parametrize("config", CONFIGS)
def test_all_ranks_name_layer_and_rank(on_two_ranks: list[dict[Any, Any]], config: tuple[int, bool]) -> None:
    errors = on_two_ranks[0][config]["errors"]
    assert errors == on_two_ranks[1][config]["errors"]
    assert list(errors) == [step for step, fault in enumerate(FAULTS) if fault is not None]
    for step, text in errors.items():
        kind, value = FAULTS[step]  # type: ignore[misc]
        word = "NaN" if value != value else "Infinity"
        assert text.startswith(f"{word} in optimiser step {step + 1}, on rank 1 of 2: {WHERE[kind]}"), text
        assert "Nothing was updated." in text and "on_non_finite skip_step" in text


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_has_changed_when_it_stops(on_two_ranks: list[dict[Any, Any]], config: tuple[int, bool]) -> None:
    for of_rank in on_two_ranks:
        assert not any(of_rank[config]["changed"].values()), of_rank[config]["changed"]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_left_out_is_as_if_its_batch_had_never_been(
    on_two_ranks: list[dict[Any, Any]], config: tuple[int, bool]
) -> None:
    for of_rank in on_two_ranks:
        assert not any(of_rank[config]["unlike"].values()), of_rank[config]["unlike"]
        assert of_rank[config]["skipped"] == 4
        assert of_rank[config]["events"] == [4, 4, 4]
