"""A rank whose forward passes leave out a layer, or that has run none, takes part in every collective."""

from __future__ import annotations

from typing import Any

import torch

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, batch, deepspeed_config
from tests.helpers.spawn import run_ranks


class _Selective(TinyModel):
    """Tokens of this rank go through the first `num_layers` layers only, as with a modality's own experts."""

    num_layers = 2

    def forward(self, x: torch.Tensor, y: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        h = self.first(x)
        for layer in self.moe[: self.num_layers]:
            h = h + layer(h)
        return (self.last(h) - y).square().mean()


def _run(rank: int, world_size: int) -> dict[str, Any]:
    model = _Selective(1, num_experts=3)
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
