"""Without `gradient_clipping` gradients are not clipped, whatever DeepSpeed's own default is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, batch, deepspeed_config, gathered
from tests.helpers.spawn import run_ranks


def _step(rank: int, world_size: int) -> dict[Any, Any]:
    """One step of SGD on gradients longer than 1: without the key, and with clipping off in words."""
    out = {}
    for stage in (0, 1, 2, 3):
        for clip in (None, 0.0):
            config = deepspeed_config(stage, kind="SGD", lr=0.01)
            del config["gradient_clipping"]
            given = config if clip is None else {**config, "gradient_clipping": clip}
            keys = set(given)
            engine = dm.initialize(TinyModel(1), given)
            assert set(given) == keys, "the caller's dictionary is his own"
            engine.backward(100 * engine(*batch(0, 16)))
            engine.step()
            out[stage, clip] = {"weights": gathered(engine), "norm": engine.gradient_norm()}
    return out


@pytest.fixture(scope="module")
def steps() -> dict[Any, Any]:
    return run_ranks(_step, 1)[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_not_clipped_unless_asked(steps: dict[Any, Any], stage: int) -> None:
    default, off = steps[stage, None], steps[stage, 0.0]
    assert off["norm"] > 1
    assert all(torch.equal(default["weights"][name], value) for name, value in off["weights"].items())
