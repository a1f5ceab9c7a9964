"""NaN and infinity on one rank: all ranks report the same, nothing is updated, and the step can be left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.engine.non_finite import Finding, describe, least_and_greatest
from dynmoe_ds.engine.snapshot import COUNTERS, take_snapshot
from dynmoe_ds.errors import ConfigError, DivergenceError, NonFiniteError
from tests.helpers.models import TinyModel, batch, deepspeed_config, shard
from tests.helpers.spawn import run_ranks

ACCUMULATE = 2
FLOAT32, BF16, BF16_SUMMED_IN_FLOAT32 = "float32", "bf16", "bf16 whose gradients are summed in float32"
CONFIGS = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in (FLOAT32, BF16)] + [(1, BF16_SUMMED_IN_FLOAT32)]
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
    ("gradient", 1e30),
    None,
]
WHERE = {
    ("loss", NAN): "NaN in optimiser step 2, on rank {last} of {size}: the loss.",
    ("input", INF): "Infinity in optimiser step 4, on rank {last} of {size}: the input of moe.1, so what comes before",
    ("gradient", -INF): "Infinity in optimiser step 5, on rank {last} of {size}: the gradient of moe.0.experts.w3.",
    ("gradient", NAN): "NaN in optimiser step 7, on rank {last} of {size}: the gradient of moe.0.experts.w3.",
    ("gradient", 1e30): "Infinity in optimiser step 8, on {all} of {size}: the norm of all gradients, each of which is",
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
            h = h + (self.checkpoint(layer, h) if self.checkpoint else layer(h))
        error = (self.last(h).float() - y.float()).square().mean()
        return error * value if kind == "loss" else error + value if kind == "huge loss" else error


def make(stage: int, dtype: str = FLOAT32, world_size: int = 2, **kwargs: Any) -> Any:
    config = deepspeed_config(stage, bf16=dtype != FLOAT32, accumulate=ACCUMULATE, clip=1.0)
    if dtype == BF16_SUMMED_IN_FLOAT32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return dm.initialize(
        FaultyModel(min(world_size, 2), router="top_any_budget"),
        config,
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
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
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
    if engine.adaptation.is_due(engine.global_steps):
        engine.adaptation.adapt(engine.global_steps, lambda: engine.masters, engine.resize_slots)


def stop_and_skip(rank: int, world_size: int, stage: int, dtype: str) -> dict[str, Any]:
    never, skip = make(stage, dtype, world_size), make(stage, dtype, world_size, on_non_finite="skip_step")
    stop = make(stage, dtype, world_size)
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
        if fault is None and step < len(FAULTS) - 1:
            continue
        wanted = state_of(never)
        ignored = ("norm", "loads") if fault is not None else ()
        out["unlike"][step] = [
            *differing(wanted, state_of(skip), *ignored),
            *differing(wanted, state_of(stop), *ignored),
        ]
    out["events"] = [len(engine.take_events()) for engine in (never, skip, stop)]
    out["skipped"] = skip.skipped_steps
    return out


def all_of(rank: int, world_size: int, configs: list[tuple[int, str]]) -> dict[Any, Any]:
    return {config: stop_and_skip(rank, world_size, *config) for config in configs}


def assert_left_out(of_ranks: list[dict[Any, Any]], config: tuple[int, str]) -> None:
    """All ranks name the same layer and rank; stopping changes nothing; leaving out is as if the batch had not been."""
    size, errors = len(of_ranks), of_ranks[0][config]["errors"]
    assert list(errors) == [step for step, fault in enumerate(FAULTS) if fault is not None]
    everyone = "rank 0" if size == 1 else "ranks " + ", ".join(map(str, range(size)))
    for step, text in errors.items():
        wanted = WHERE[FAULTS[step]].format(last=size - 1, size=size, all=everyone)  # type: ignore[index]
        assert text.startswith(wanted), text
        assert "Nothing was updated." in text and "on_non_finite skip_step" in text
    for of_rank in of_ranks:
        assert of_rank[config]["errors"] == errors
        assert not any(of_rank[config]["changed"].values()), of_rank[config]["changed"]
        assert not any(of_rank[config]["unlike"].values()), of_rank[config]["unlike"]
        assert of_rank[config]["skipped"] == 5
        assert of_rank[config]["events"] == [4, 4, 4]


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[Any, Any]]:
    return run_ranks(all_of, 2, CONFIGS, timeout_s=240)


@pytest.mark.parametrize("config", CONFIGS)
def test_two_ranks(on_two_ranks: list[dict[Any, Any]], config: tuple[int, str]) -> None:
    assert_left_out(on_two_ranks, config)


@pytest.mark.parametrize(("num_ranks", "configs"), [(1, [(0, BF16), (1, FLOAT32)]), (4, [(3, FLOAT32)])])
def test_one_and_four_ranks(num_ranks: int, configs: list[tuple[int, str]]) -> None:
    results = run_ranks(all_of, num_ranks, configs, timeout_s=120)
    for config in configs:
        assert_left_out(results, config)


def error_of(engine: Any, step: int, rank: int, world_size: int, fault: tuple[str, float] | None = None) -> str:
    try:
        take_step(engine, step, rank, world_size, fault)
    except NonFiniteError as error:
        return f"{error}"
    return ""


def broken_weight(rank: int, world_size: int, stage: int) -> str:
    """The error after a router's weight has become NaN in the memory of rank 1."""
    engine = make(stage, on_non_finite="skip_step")
    take_step(engine, 0, rank, world_size)
    if rank == 1:
        engine.layers["moe.0"].router.weight.data.view(-1)[3] = NAN  # small enough to be whole at ZeRO-3
    return error_of(engine, 1, rank, world_size)


def in_a_row(rank: int, world_size: int, folder: str) -> tuple[list[str], int, str]:
    """Errors of faulty steps, how many were left out, and the error of one more after going back to a checkpoint."""
    engine = make(2, on_non_finite="skip_step")
    engine.save_checkpoint(f"{folder}/row")
    errors = [error_of(engine, step, rank, world_size, ("loss", NAN)) for step in range(3)]
    errors.append(error_of(engine, 3, rank, world_size))
    errors += [error_of(engine, step, rank, world_size, ("loss", NAN)) for step in range(4, 15)]
    num_left_out = engine.skipped_steps
    engine.load_checkpoint(f"{folder}/row")
    return errors, num_left_out, error_of(engine, 0, rank, world_size, ("loss", NAN))


def finite(rank: int, world_size: int) -> tuple[int, int]:
    """Steps, and those left out, with a huge loss, with NaN in padding, and with NaN that nobody trains on."""
    engine = make(1, on_non_finite="skip_step")
    take_step(engine, 0, rank, world_size, ("huge loss", 1e30))
    model = TinyModel(2)
    padded = dm.initialize(model, deepspeed_config(1), on_non_finite="skip_step")
    x, y = (t.view(2, -1, t.shape[-1]) for t in shard(batch(0, 32), rank, world_size))
    mask = torch.ones(x.shape[:2])
    mask[0, -2:] = 0
    model.first.register_forward_hook(lambda module, args, out: out.masked_fill(mask[..., None] == 0, NAN))
    model.last.register_forward_pre_hook(lambda module, args: args[0].masked_fill(mask[..., None] == 0, 0.0))
    padded.backward(padded(x, y, attention_mask=mask))
    padded.step()
    engine.eval()
    engine(*shard((batch(0, 32)[0] * NAN, batch(0, 32)[1]), rank, world_size))
    engine.train()
    take_step(engine, 1, rank, world_size)
    return engine.global_steps + padded.global_steps, engine.skipped_steps + padded.skipped_steps


def scheduled(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """A scheduler and a checkpoint around steps that are left out."""
    out = {}
    for stage in (0, 1):
        config = deepspeed_config(stage, accumulate=ACCUMULATE)
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_type": "linear"}}
        engine = dm.initialize(FaultyModel(2), config, on_non_finite="skip_step")
        for step in range(4):
            take_step(engine, step, rank, world_size, ("loss", NAN) if step in (1, 2) else None)
        out[f"updates {stage}"] = engine.lr_scheduler.last_batch_iteration + 1
        engine.save_checkpoint(f"{folder}/{stage}")
        again = dm.initialize(FaultyModel(2), config)
        again.load_checkpoint(f"{folder}/{stage}")
        out[f"steps {stage}"] = (again.global_steps, again.skipped_steps)
    return out


def checkpointed(rank: int, world_size: int) -> str:
    """Recomputation in the backward pass finds nothing a second time."""
    model = FaultyModel(2, checkpoint=lambda layer, h: checkpoint(layer, h, use_reentrant=False))
    engine = dm.initialize(model, deepspeed_config(1, accumulate=ACCUMULATE))
    return error_of(engine, 0, rank, world_size, ("input", NAN))


def refused(rank: int, world_size: int) -> list[str]:
    found = []
    for policy in ("roll_back", ("stop", "skip_step")[rank]):
        try:
            dm.initialize(TinyModel(2), deepspeed_config(1), on_non_finite=policy)  # type: ignore[arg-type]
        except (ConfigError, DivergenceError) as error:
            found.append(f"{error}")
    return found


def special_cases(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    return {
        "weights": [broken_weight(rank, world_size, stage) for stage in (0, 1, 2, 3)],
        "row": in_a_row(rank, world_size, folder),
        "finite": finite(rank, world_size),
        "scheduled": scheduled(rank, world_size, folder),
        "checkpointed": checkpointed(rank, world_size),
        "refused": refused(rank, world_size),
    }


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = run_ranks(special_cases, 2, f"{tmp_path_factory.mktemp('checkpoints')}", timeout_s=120)
    assert first == second
    return first


def test_weights_that_are_not_finite_stop_the_run_at_once(special: dict[str, Any]) -> None:
    for error in special["weights"]:
        assert error.startswith("NaN in optimiser step 2, on rank 1 of 2: the auxiliary losses of moe.0."), error
        assert "Weights hold NaN or infinity themselves: moe.0.router.weight on rank 1." in error
        assert error.endswith("Nothing was updated. Weights do not become finite again: go back to a checkpoint.")


def test_more_than_ten_in_a_row_stop_the_run(special: dict[str, Any]) -> None:
    errors, num_left_out, error_after_going_back = special["row"]
    assert not any(errors[:-1]) and num_left_out == 13
    assert "The updates of the 10 steps before were left out already." in errors[-1]
    assert not error_after_going_back, "a checkpoint is a new beginning"


def test_what_is_finite_or_not_trained_on_is_left_alone(special: dict[str, Any]) -> None:
    assert special["finite"] == (3, 0)


def test_a_scheduler_counts_updates_and_a_checkpoint_what_was_left_out(special: dict[str, Any]) -> None:
    assert special["scheduled"] == {"updates 0": 2, "steps 0": (4, 2), "updates 1": 2, "steps 1": (4, 2)}


def test_recomputation_is_not_watched(special: dict[str, Any]) -> None:
    assert special["checkpointed"].startswith("NaN in optimiser step 1, on rank 1 of 2: the input of moe.1, so what")


def test_unknown_and_differing_policies_are_refused(special: dict[str, Any]) -> None:
    unknown, differing = special["refused"]
    assert unknown == "on_non_finite is 'roll_back'. Use stop or skip_step."
    assert 'on_non_finite is "stop" on rank 0, "skip_step" on rank 1.' in differing


def test_a_message_names_a_few_and_counts_the_others() -> None:
    def finding(kind: Any, name: str, **values: Any) -> Finding:
        return Finding(**{"kind": kind, "name": name, "has_nan": True, "micro_step": 0, "position": 0} | values)

    gradients = [finding("gradient", f"w{i}", position=i) for i in (3, 1, 2, 5, 4, 6)]
    earlier = [finding("input", "moe.1", micro_step=1), finding("loss", ""), *gradients, finding("norm", "")]
    found = describe(7, [[finding("norm", "")], earlier, gradients], [[], ["w1"], ["w1", "w2"]])
    assert found.text == (
        "NaN in optimiser step 7, on rank 1 of 3: the loss. Not finite as well: the input of moe.1 on rank 1; the "
        "gradients of w1, w2, w3, w4, and 2 more on ranks 1, 2. Weights hold NaN or infinity themselves: w1 on "
        "ranks 1, 2; w2 on rank 2."
    )
    assert found.bad_weights == ("w1", "w2")


def test_sparse_and_empty_gradients_are_watched() -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    assert [float(value) for value in least_and_greatest(table.weight.grad)] == [2.0, 2.0]  # type: ignore[arg-type]
    assert least_and_greatest(torch.zeros(0, 3)) == []


def test_values_whose_sum_would_overflow_are_finite() -> None:
    assert all(value.isfinite() for value in least_and_greatest(torch.full((9, 9), 3e38)))
