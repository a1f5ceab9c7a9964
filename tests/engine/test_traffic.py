"""What an engine says that its ranks send to each other, and how rows travel in it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError, DivergenceError
from dynmoe_ds.training.observation import traffic_metrics
from tests.helpers.models import TinyModel, deepspeed_config, train
from tests.helpers.spawn import run_ranks

non_reentrant = partial(checkpoint, use_reentrant=False)


def _traffic(rank: int, world_size: int) -> list[Any]:
    found = []
    for ep_size, chunks, recompute in ((1, 1, False), (2, 1, False), (2, 2, False), (2, 1, True)):
        model = TinyModel(ep_size, num_experts=8, checkpoint=non_reentrant if recompute else None)
        engine = dm.initialize(model, deepspeed_config(2, accumulate=2), dispatch=dm.DispatchConfig(chunks=chunks))
        train(engine, range(2), rank, world_size, accumulate=2)
        traffic = engine.take_traffic()
        assert engine.take_traffic() == {}
        metrics = {metric.name: metric.value for metric in traffic_metrics(traffic, num_tokens=10)}
        found.append(
            {
                "layers": list(traffic),
                "rows": sum(of_layer.sent.row_bytes for of_layer in traffic.values()),
                "least": sum(int(of_layer.least_row_bytes) for of_layer in traffic.values()),
                "metadata": sum(of_layer.sent.metadata_bytes for of_layer in traffic.values()),
                "metrics": metrics,
            }
        )
    return found


def test_an_engine_counts_what_its_ranks_send() -> None:
    ranks = run_ranks(_traffic, 2)
    for of_rank in ranks:
        assert of_rank[0]["layers"] == [] and of_rank[0]["metrics"] == {}, "one rank holds everything"
        for found in of_rank[1:]:
            assert found["layers"] == ["moe.0", "moe.1"]
            assert found["metrics"] == {
                "moe/sent_row_bytes_per_token": found["rows"] / 10,
                "moe/least_row_bytes_per_token": found["least"] / 10,
                "moe/sent_metadata_bytes_per_token": found["metadata"] / 10,
            }
    flat, in_chunks, recomputed = ([of_rank[i] for of_rank in ranks] for i in (1, 2, 3))
    total = sum(of_rank["rows"] for of_rank in flat)
    assert total == sum(of_rank["least"] for of_rank in flat) > 0
    # As many rows in chunks, with a count more per chunk; recomputation is not counted.
    assert [of_rank["rows"] for of_rank in in_chunks] == [of_rank["rows"] for of_rank in flat]
    assert all(b["metadata"] > a["metadata"] for a, b in zip(flat, in_chunks, strict=True))
    assert recomputed == flat


def _refused(rank: int, world_size: int) -> list[str]:
    messages = []
    for dispatch in (
        dm.DispatchConfig(chunks=0),
        dm.DispatchConfig(ranks_per_node=3),
        dm.DispatchConfig(chunks=1 + rank),
    ):
        try:
            dm.initialize(TinyModel(2), deepspeed_config(1), dispatch=dispatch)
        except (ConfigError, DivergenceError) as error:
            messages.append(str(error))
    dist.barrier()  # nobody waits for the other
    return messages


def test_dispatch_that_cannot_work_or_differs_between_ranks_is_refused_on_all() -> None:
    for chunks, node, differing in run_ranks(_refused, 2):
        assert chunks == "dispatch.chunks is 0 but must be at least 1."
        assert node.startswith("dispatch.ranks_per_node is 3 and ep_size 2, but one must divide the other")
        assert "dispatch" in differing and '"chunks": 2' in differing.replace("'", '"'), differing


def test_no_layers_no_traffic() -> None:
    assert traffic_metrics({}, num_tokens=0) == []


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_nodes_that_fit_a_group_of_two(per_node: int) -> None:
    assert dm.DispatchConfig(ranks_per_node=per_node).faults_with(2) == []
