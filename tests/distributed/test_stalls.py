"""Stalls against a clock that the test turns on, and on real ranks of which one is late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from dynmoe_ds.distributed import Flight, Parcel, Splits, StallClock, communication, exchange_counts, stalls
from tests.helpers.spawn import run_ranks

CPU = torch.device("cpu")


class HandClock:
    """Time that passes when told to."""

    now = 10.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    clock = HandClock()
    monkeypatch.setattr(stalls, "time", clock)
    return clock


@pytest.fixture
def clock() -> Iterator[StallClock]:
    clock = StallClock(CPU)
    yield clock
    clock.stop()


def test_a_stall_lasts_as_long_as_its_block_and_what_is_inside_is_a_part_of_it(hand: HandClock, clock: StallClock):
    with clock.stall("communication"):
        hand.now += 2
        with clock.stall("data"):
            hand.now += 1
    hand.now += 100  # the computation
    with clock.stall("data"):
        hand.now += 0.5
    with pytest.raises(ValueError), clock.stall("communication"):
        hand.now += 0.25
        raise ValueError("lost rank")
    assert clock.take() == {"communication": [3.0, 0.25], "data": [0.5]}
    assert clock.take() == {"communication": [], "data": []}


@pytest.mark.parametrize(("world_size", "expected"), [(2, [4.0]), (1, [])])
def test_collectives_count_while_the_clock_runs_and_never_in_a_group_of_one(
    world_size: int, expected: list[float], hand: HandClock, clock: StallClock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dist, "get_world_size", lambda group: world_size)

    def collective() -> None:
        with communication():
            hand.now += 4

    collective()
    clock.start()
    collective()
    clock.stop()
    clock.stop()
    collective()
    assert clock.take()["communication"] == expected


class FakeEvent:
    """As of a device that has done its first `num_done` events; counts how often the host waited for it."""

    recorded: ClassVar[list[FakeEvent]] = []
    num_done, num_waits = 0, 0

    def __init__(self, device: Any, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.at = len(FakeEvent.recorded)
        FakeEvent.recorded.append(self)

    def query(self) -> bool:
        return self.at < FakeEvent.num_done

    def synchronize(self) -> None:
        FakeEvent.num_waits += not self.query()
        FakeEvent.num_done = max(FakeEvent.num_done, self.at + 1)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query() and end.query()
        return 1000.0 * (end.at - self.at) ** 2


def test_on_an_accelerator_events_are_read_late_and_used_again(monkeypatch: pytest.MonkeyPatch):
    accelerator = SimpleNamespace(stream="compute")
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: accelerator.stream)
    monkeypatch.setattr(FakeEvent, "recorded", [])
    clock = StallClock(torch.device("cuda", 0))
    for _ in range(3):
        with clock.stall("communication"):
            pass
    accelerator.stream = "beside"
    with clock.stall("communication"):
        pass
    accelerator.stream = "compute"
    assert len(FakeEvent.recorded) == 6 and FakeEvent.num_waits == 0
    FakeEvent.num_done = 4
    with clock.stall("data"):
        FakeEvent(None, True).record("compute")  # something else of the stream
    assert FakeEvent.num_waits == 0, "nobody waits before the line is logged"
    assert clock.take() == {"communication": [1.0] * 3, "data": [4.0]}
    assert FakeEvent.num_waits == 2  # for the last of those before, and for the last one
    with clock.stall("data"):
        pass
    assert FakeEvent.recorded[-1] in FakeEvent.recorded[:-1], "events are used again"


def _late(rank: int, world_size: int) -> dict[str, Any]:
    """Rank 0 comes to every collective 0.1 s after rank 1 has begun to stand still for it."""
    store = dist.distributed_c10d._get_default_store()
    begun = {"n": 0}
    mark = stalls._HostTimer.mark

    def telling(timer: Any) -> float:
        at = mark(timer)
        begun["n"] += 1
        store.set(f"{rank}-{begun['n']}", b"")
        return at

    stalls._HostTimer.mark = telling
    clock = StallClock(CPU)
    clock.start()

    def come_late(to_mark: int) -> None:
        if rank == 0:
            store.wait([f"1-{to_mark}"])
            time.sleep(0.1)

    group = dist.group.WORLD
    come_late(1)
    exchange_counts(torch.ones(2, 1, dtype=torch.int64), group)
    sent = torch.ones(2, 3, requires_grad=True)
    splits = Splits(sent=[1, 1], received=[1, 1])
    come_late(3)
    flight = Flight([Parcel(tensor=sent, splits=splits)], group)
    (received,) = flight.wait()
    come_late(5)
    received.sum().backward()
    taken = clock.take()
    clock.stop()
    exchange_counts(torch.ones(2, 1, dtype=torch.int64), group)
    return {"seconds": taken, "after": clock.take()}


def test_a_rank_stands_still_until_the_late_one_comes():
    first, second = run_ranks(_late, 2)
    assert len(first["seconds"]["communication"]) == len(second["seconds"]["communication"]) == 3
    assert min(second["seconds"]["communication"]) >= 0.1, "counts, rows and their gradients"
    assert first["after"] == second["after"] == {"communication": [], "data": []}
    assert first["seconds"]["data"] == []
