"""Stalls of a stream, which only a GPU has. Not run yet on any."""

from __future__ import annotations

import pytest
import torch

from dynmoe_ds.distributed import StallClock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CYCLES = 50_000_000


def test_a_stall_is_what_the_computation_waits_for_and_not_what_runs_beside_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    clock, beside = StallClock(device), torch.cuda.Stream(device)
    compute = torch.cuda.current_stream(device)
    # As a collective: on a stream of its own, for which the computation waits at once or later.
    beside.wait_stream(compute)
    with torch.cuda.stream(beside), clock.stall("communication"):
        torch.cuda._sleep(CYCLES)
    with clock.stall("communication"):
        compute.wait_stream(beside)
    torch.cuda._sleep(CYCLES)  # the computation
    with clock.stall("data"):
        pass
    taken = clock.take()
    (waited,), (loaded,) = taken["communication"], taken["data"]
    assert waited > 100 * loaded >= 0
