"""A rank whose forward passes leave out a layer, or that has run none, takes part in every collective."""

from __future__ import annotations

from typing import Any

import dynmoe_ds as dm
from tests.helpers.models import SelectiveModel, batch, deepspeed_config
from tests.helpers.spawn import run_ranks


def _run(rank: int, world_size: int) -> dict[str, Any]:
    model = SelectiveModel(1, num_experts=3)
    model.num_layers = 0 if rank == 1 else 2  # rank 1 has no record of any layer
    engine = dm.initialize(model, deepspeed_config(0), dm.AdaptationConfig(1, 1))
    nothing = engine.take_records()
    for step in range(2):
        engine.backward(engine(*batch(step, 8)))
        engine.step()
    records = engine.take_records()
    if rank == 1:
        engine.take_records(reduce=False)
    return {
        "nothing": {name: int(r.num_tokens) for name, r in nothing.items()},
        "num_tokens": {name: int(r.num_tokens) for name, r in records.items()},
        "pools": {name: p.expert_ids for name, p in engine.placements().items()},
        "events": [e.layers["moe.1"]["num_tokens"] for e in engine.take_events()],
    }


def test_a_rank_without_records_takes_part() -> None:
    first, second = run_ranks(_run, 2)
    assert first == second
    assert first["nothing"] == {"moe.0": 0, "moe.1": 0}
    assert first["num_tokens"] == {"moe.0": 16, "moe.1": 16}
    assert first["events"] == [8, 8]
