"""Bytes and collectives of a step against what torch.distributed is given by real engines."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import dynmoe_ds as dm
from dynmoe_ds.config.deepspeed_json import to_deepspeed
from dynmoe_ds.models import build_decoder, parameter_groups
from dynmoe_ds.planning import Layout, shape_of, work_per_rank
from dynmoe_ds.routing import TopKConfig
from tests.helpers.run_config import small_run
from tests.helpers.spawn import run_ranks
from tests.planning.examples import layout, shape

NUM_RANKS, VOCAB = 2, 400
# What a rank of n sends of the bytes that it hands over, by operation: a ring's all-reduce twice its buffer; of the
# others the mode below counts the whole buffer, of which 1/n stays.
TIMES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1}
SMALL = 100  # bytes: norms, flags and checks, which the model leaves out


class _Wire(TorchDispatchMode):
    """Bytes sent to other ranks and collectives by operation, of tensors above `SMALL` bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            if name in TIMES:
                self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        # all-reduce: (tensors, group, ...); the others: (output, input, group, ...), the larger of which is whole.
        tensors = args[0] if name == "allreduce_" else args[:2]
        tensors = [t for t in torch.utils._pytree.tree_leaves(tensors) if isinstance(t, torch.Tensor)]
        group = dist.ProcessGroup.unbox(args[1] if name == "allreduce_" else args[2])
        sizes = [t.numel() * t.element_size() for t in tensors]
        whole = sizes[1] if name == "alltoall_base_" else max(sizes)
        self.collectives[name] += 1
        if name == "alltoall_base_" or whole > SMALL:
            self.sent[name] += TIMES[name] * whole * (group.size() - 1) / group.size()


def _step_on_the_wire(rank: int, world_size: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for case in cases:
        config = small_run(**case)
        model = build_decoder(config, VOCAB, 0)
        groups = parameter_groups(model, 0.1)
        engine = dm.initialize(model, to_deepspeed(config), model_parameters=groups, dispatch=config.parallel.dispatch)
        ids = torch.randint(VOCAB, (4, 24), generator=torch.Generator().manual_seed(rank))

        def step(engine: Any = engine, ids: torch.Tensor = ids, config: Any = config) -> None:
            for _ in range(config.training.gradient_accumulation_steps):
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()

        step()
        engine.take_traffic()
        with _Wire() as wire:
            step()
        (traffic,) = engine.take_traffic().values() if config.parallel.ep_size > 1 else (None,)
        found.append(
            {
                "sent": dict(wire.sent),
                "collectives": dict(wire.collectives),
                "rows": 0 if traffic is None else traffic.sent.row_bytes,
                "metadata": 0 if traffic is None else traffic.sent.metadata_bytes,
            }
        )
    return found


def _layout(config: Any) -> Layout:
    parallel = config.parallel
    return layout(
        num_ranks=parallel.num_ranks,
        ep_size=parallel.ep_size,
        zero_stage=parallel.zero_stage,
        dtype=parallel.dtype,
        checkpointing=parallel.activation_checkpointing != "none",
        chunks=parallel.dispatch.chunks,
    )


def _case(stage: int, ep_size: int, **values: Any) -> dict[str, Any]:
    """Every token takes all experts, so that the closed form of rows is no expectation but the number."""
    return {
        "router": TopKConfig(k=4),
        "parallel__num_ranks": NUM_RANKS,
        "parallel__zero_stage": stage,
        "parallel__ep_size": ep_size,
        "training__gradient_accumulation_steps": 3,
        "model__num_slots": 4,
        **values,
    }


CASES = [
    *[_case(stage, ep_size) for stage in range(4) for ep_size in (1, 2)],
    _case(1, 1, parallel__dtype="bfloat16"),
    _case(2, 2, parallel__dtype="bfloat16"),
    _case(1, 2, parallel__activation_checkpointing="torch"),
    _case(0, 2, parallel__dispatch=dm.DispatchConfig(chunks=2)),
]


@pytest.fixture(scope="module")
def measured() -> list[list[dict[str, Any]]]:
    return run_ranks(_step_on_the_wire, NUM_RANKS, CASES, timeout_s=240)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_gradients_and_split_weights(measured, index) -> None:
    config = small_run(**CASES[index])
    want = work_per_rank(shape_of(config, None), _layout(config)).synchronisation
    for of_rank in measured:
        sent = of_rank[index]["sent"]
        got = sum(size for name, size in sent.items() if name != "alltoall_base_")
        assert got == pytest.approx(want.bytes_within, rel=1e-3), sent
    assert want.bytes_between == 0


@pytest.mark.parametrize("index", [i for i, case in enumerate(CASES) if case["parallel__ep_size"] == 2])
def test_rows_and_what_goes_with_them(measured, index) -> None:
    config = small_run(**CASES[index])
    model, plan = shape_of(config, None), _layout(config)
    want = work_per_rank(model, plan).dispatch
    chunks, again = plan.chunks, int(plan.checkpointing)
    # Two int64 numbers to the other rank per chunk: how many rows, how many entries. Left out of the model.
    counts = 16 * chunks * model.num_moe_layers * model.accumulation_steps * (1 + again)
    for of_rank in measured:
        found = of_rank[index]
        assert found["sent"]["alltoall_base_"] == want.bytes_within + counts
        assert found["collectives"]["alltoall_base_"] == want.collectives_within
        if not again:  # telemetry does not count what is sent again
            assert found["rows"] + found["metadata"] == want.bytes_within + counts
            rows = model.tokens * model.accumulation_steps * model.hidden_size * 4
            assert found["rows"] == rows * (4 if plan.dtype == "float32" else 2)


def test_zero_3_gathers_large_tensors_once_per_micro_step() -> None:
    model = shape(dense_tensors=(100_000, 100_001), accumulation_steps=3, num_moe_layers=0)
    sent = work_per_rank(model, layout(num_ranks=2, ep_size=1, zero_stage=3)).synchronisation
    gradients, large, small = 3 * 200_001, 3 * 100_001, 100_000
    assert sent.bytes_within == 0.5 * 4 * (gradients + large + small)


def test_zero_3_of_a_model_that_cannot_stay_whole_gathers_for_each_direction() -> None:
    small = work_per_rank(shape(dense_tensors=(10**9,), num_moe_layers=0), layout(ep_size=1, zero_stage=3))
    large = work_per_rank(shape(dense_tensors=(10**9 + 1,), num_moe_layers=0), layout(ep_size=1, zero_stage=3))
    assert large.synchronisation.bytes_within / small.synchronisation.bytes_within == pytest.approx(3 / 2)


def test_work_of_products_worked_out_by_hand() -> None:
    """100 tokens, 2 micro steps; 4000 FLOPs outside experts, 2 experts of 1200; an output layer of 2·10·50."""
    work = work_per_rank(shape(accumulation_steps=2), layout())
    assert work.dense_flops == 2 * 100 * 4000 * 3
    assert work.expert_flops == 2 * 100 * 2 * 1200 * 3
    assert work.router_entries == 2 * 100 * 8 * 3
    assert (work.layer_passes, work.slot_passes, work.micro_steps, work.tensors) == (2 * 2 * 2, 2 * 2 * 2, 2, 5)
    again = work_per_rank(shape(accumulation_steps=2), layout(checkpointing=True))
    assert again.dense_flops == 2 * 100 * (4000 * 4 - 1000)
    assert again.expert_flops == 2 * 100 * 2 * 1200 * 4
    assert (again.layer_passes, again.slot_passes) == (2 * 2 * 3, 2 * 2 * 3)


def test_the_update_touches_what_zero_leaves_on_a_rank() -> None:
    """2000 parameters outside the experts, 8 slots of 600; 10 passes in float32, two copies of a part, one of all."""
    whole = work_per_rank(shape(), layout(num_ranks=4, ep_size=2, zero_stage=0)).optimizer_bytes
    assert whole == 10 * 4 * (2000 + 4 * 600)
    for stage, times in ((1, 1), (2, 3), (3, 3)):
        plan = layout(num_ranks=4, ep_size=2, zero_stage=stage, dtype="bfloat16")
        split = work_per_rank(shape(accumulation_steps=3), plan)
        part = 2000 / 4 + 4 * 600 / 2
        assert split.optimizer_bytes == part * (10 * 4 + 2 * (2 + 4)) + times * (2000 + 4 * 600) * 2 * 2
        assert split.fetches == (3 * 5 if stage == 3 else 0)


def test_between_nodes_go_rows_for_other_nodes_and_all_gradients() -> None:
    flat = work_per_rank(shape(), layout(num_nodes=2, ep_size=4))
    by_node = work_per_rank(shape(), layout(num_nodes=2, ep_size=4, by_node=True))
    assert by_node.dispatch.bytes_between < flat.dispatch.bytes_between
    assert by_node.dispatch.collectives_between == by_node.dispatch.collectives_within == 1 + 7
    assert flat.dispatch.collectives_within == 0
    assert by_node.synchronisation == flat.synchronisation
    assert flat.synchronisation.bytes_within == 0
    assert flat.synchronisation.bytes_between == 2 * 3 / 4 * 2000 * 4, "each expert is on one rank"
