"""How long a rank's computation stands still: for other ranks, and for data."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

Cause = Literal["communication", "data"]

# The clocks that run now. Collectives happen deep inside of models and of DeepSpeed, where nothing can be handed to.
_RUNNING: list[StallClock] = []


@contextmanager
def communication(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Around a collective of `group` (None: all ranks), or around the wait for one: a stall for the clocks that run.

    Only for what every rank does equally often, so that their stalls can be compared one by one; and only where the
    computation happens, not in a thread beside it. A group of one rank waits for nobody and counts nothing.
    """
    if not _RUNNING or dist.get_world_size(group) == 1:
        yield
        return
    begun = [(clock, clock.begin()) for clock in _RUNNING]
    try:
        yield
    finally:
        for clock, begin in begun:
            clock.end("communication", begin)


class StallClock:
    """Seconds for which the computation of this rank stood still, stall by stall, between `start` and `stop`.

    On a CPU they are the host's. An accelerator is behind its host, so there two events of the computation's stream
    enclose a stall, and are read once they have passed: nobody waits for them before `take`. What runs on another
    stream runs beside the computation, and is no stall.

    device: where this rank computes; its current stream is the computation's.
    """

    def __init__(self, device: torch.device) -> None:
        self._timer: _HostTimer | _StreamTimer = _HostTimer() if device.type == "cpu" else _StreamTimer(device)
        self._under_way: deque[tuple[Cause, Any, Any]] = deque()
        self._seconds: dict[Cause, list[float]] = {cause: [] for cause in get_args(Cause)}
        self._is_stalled = False

    def start(self) -> None:
        """Count collectives from now on. Not needed for stalls that are told with `stall`."""
        _RUNNING.append(self)

    def stop(self) -> None:
        """Count no more collectives; calling it twice does nothing."""
        if self in _RUNNING:
            _RUNNING.remove(self)

    @contextmanager
    def stall(self, cause: Cause) -> Iterator[None]:
        """Around what the computation waits for. One inside another is a part of it, and not counted by itself."""
        begin = self.begin()
        try:
            yield
        finally:
            self.end(cause, begin)

    def begin(self) -> Any:
        """The mark for `end`; None where nothing is to be counted. `stall` is easier to use right."""
        if self._is_stalled or (mark := self._timer.mark()) is None:
            return None
        self._is_stalled = True
        return mark

    def end(self, cause: Cause, begin: Any) -> None:
        """End the stall that `begin` began."""
        if begin is None:
            return
        self._is_stalled = False
        self._under_way.append((cause, begin, self._timer.mark()))
        self._read(only_passed=True)

    def take(self) -> dict[Cause, list[float]]:
        """The seconds of every stall since the last call, by cause and in order. Waits for the device."""
        self._read(only_passed=False)
        seconds, self._seconds = self._seconds, {cause: [] for cause in self._seconds}
        return seconds

    def _read(self, *, only_passed: bool) -> None:
        while self._under_way and not (only_passed and not self._timer.has_passed(self._under_way[0][2])):
            cause, begin, end = self._under_way.popleft()
            self._seconds[cause].append(self._timer.seconds(begin, end))


class _HostTimer:
    """Marks are readings of the host's clock."""

    def mark(self) -> float:
        return time.perf_counter()

    def has_passed(self, mark: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class _StreamTimer:
    """Marks are events of the stream that was current when the timer was made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.accelerator.current_stream(device)
        self._unused: list[torch.Event] = []

    def mark(self) -> torch.Event | None:
        """None on another stream."""
        if torch.accelerator.current_stream(self._device) != self._stream:
            return None
        event = self._unused.pop() if self._unused else torch.Event(self._device, enable_timing=True)
        event.record(self._stream)
        return event

    def has_passed(self, mark: torch.Event) -> bool:
        return mark.query()

    def seconds(self, begin: torch.Event, end: torch.Event) -> float:
        """Waits for both. Call it once: the events are used again."""
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        self._unused += (begin, end)
        return milliseconds / 1000
