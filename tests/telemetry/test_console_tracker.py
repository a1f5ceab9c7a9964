from __future__ import annotations

import io
import logging
import math
from typing import Any

import pytest

from dynmoe_ds.telemetry.metrics import Metric
from dynmoe_ds.telemetry.trackers import (
    ConsoleTracker,
    clock_time,
    short_list,
    short_number,
    spoken_time,
)
from tests.telemetry.events_for_tests import LAYER, event
from tests.telemetry.metrics_for_tests import metrics

FULL = [
    *metrics(train__loss=3.4123, eval__loss=3.391, moe__mean_k=2.13, train__tokens_per_second=12345.0),
    Metric(name="moe/live_experts/a", value=6, reduction="last"),
    Metric(name="moe/live_experts/b", value=5, reduction="last"),
]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after `written`: a carriage return goes back and overwrites."""
    lines = [""]
    column = 0
    for character in written:
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


class Clock:
    """Time that passes only when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_one_line_per_log_call_where_the_stream_is_no_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    tracker = ConsoleTracker(300, stream, clock)
    tracker.log(100, metrics(train__loss=4.0))
    clock.now += 4.6  # 0.23 s per step and 180 steps left: 41.4 s
    tracker.log(120, [*FULL, *metrics(train__step_time_s=0.2, train__compute_time_s=0.17)])
    tracker.close()
    assert stream.getvalue() == (
        "step  100/300  loss 4.000\n"
        "step  120/300  loss 3.412  held-out 3.391  k 2.13  experts 6 5  12.3k tok/s  compute 85%  eta 0:41\n"
    )


def test_the_first_estimate_comes_from_the_step_time_and_the_held_out_loss_stays() -> None:
    stream, clock = io.StringIO(), Clock()
    tracker = ConsoleTracker(10, stream, clock)
    tracker.log(1, metrics(train__step_time_s=2.0, eval__loss=5.0))
    clock.now += 1
    tracker.log(2, metrics(train__loss=math.nan))
    assert (
        stream.getvalue() == "step   1/10  held-out 5.000  eta 0:18\nstep   2/10  loss nan  held-out 5.000  eta 0:08\n"
    )


def test_many_layers_are_summed_up() -> None:
    stream = io.StringIO()
    live = [Metric(name=f"moe/live_experts/{index}", value=3 + index, reduction="last") for index in range(9)]
    ConsoleTracker(10, stream).log(10, live)
    assert stream.getvalue() == "step  10/10  experts 3..11 in 9 layers\n"


def test_a_terminal_sees_one_line_rewritten_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    tracker = ConsoleTracker(300, stream, Clock())
    tracker.log(1, metrics(train__loss=1e15))
    tracker.log(2, metrics(train__loss=4.0))
    assert "\n" not in stream.getvalue() and stream.getvalue().count("\r") == 2
    assert screen(stream.getvalue()) == ["step    2/300  loss 4.000  eta 0:00"]
    tracker.log_event(event())
    assert screen(stream.getvalue())[1:] == ["step    2/300  loss 4.000  eta 0:00"]
    tracker.log(3, metrics(train__loss=3.0))
    tracker.close()
    tracker.close()
    assert screen(stream.getvalue()) == [
        f"step 60: layer {LAYER} grew expert 4 (copy_nearest of 2), pruned 1 -> 5 live of 16 slots",
        "step    3/300  loss 3.000  eta 0:00",
        "",
    ]


def test_a_line_longer_than_the_terminal_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    ConsoleTracker(300, stream).log(120, FULL)
    assert screen(stream.getvalue()) == ["step  120/300  loss"]


def test_without_a_stream_lines_go_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    tracker = ConsoleTracker(10)
    with caplog.at_level(logging.INFO):
        tracker.log(5, metrics(train__loss=1.0))
        tracker.log_event(event(5))
        tracker.close()
    assert [record.message for record in caplog.records] == [
        "step   5/10  loss 1.000",
        f"step 5: layer {LAYER} grew expert 4 (copy_nearest of 2), pruned 1 -> 5 live of 16 slots",
    ]
    assert {record.name for record in caplog.records} == {"dynmoe_ds.telemetry.trackers"}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            event(pruned=[], grown=[], moved=[{"expert_id": 3, "from_slot": 1, "to_slot": 9}]),
            [f"step 60: layer {LAYER} moved expert 3 from slot 1 to 9 -> 5 live of 16 slots"],
        ),
        (
            event(pruned=[1, 2], grown=[{"expert_id": 7, "slot": 1, "rank": 0, "parent_id": None, "seeding": "fresh"}]),
            [f"step 60: layer {LAYER} grew expert 7 (fresh), pruned 1 2 -> 5 live of 16 slots"],
        ),
        (
            event(
                pruned=[],
                grown=[
                    {"expert_id": 7, "slot": 1, "rank": 0, "parent_id": 2, "seeding": "copy_nearest"},
                    {"expert_id": 8, "slot": 4, "rank": 1, "parent_id": None, "seeding": "mean"},
                    {"expert_id": 9, "slot": 5, "rank": 1, "parent_id": 7, "seeding": "split"},
                ],
            ),
            [
                f"step 60: layer {LAYER} grew expert 7 (copy_nearest of 2), expert 8 (mean), expert 9 (split of 7) "
                "-> 5 live of 16 slots"
            ],
        ),
        (event(pruned=[], grown=[]), []),
        (
            event(pruned=[], grown=[], live_after=5, num_slots_before=24),
            [f"step 60: layer {LAYER} pool resized from 24 slots -> 5 live of 16 slots"],
        ),
        (event(pruned=[], grown=[], num_slots_before=16), []),
        (
            event(pruned=[], grown=[], live_after=16, out_of_slots=True, warnings=("k is high",)),
            [
                f"step 60: layer {LAYER} is out of slots: 16 of 16 are live, so no further expert could be added. "
                "Raise model.num_slots, use adaptation.pool=elastic, end growth earlier "
                "(adaptation.last_growth_step), or prune more (adaptation.prune_below_share).",
            ],
        ),
    ],
)
def test_events_in_words(told: dict[str, Any], expected: list[str]) -> None:
    stream = io.StringIO()
    ConsoleTracker(300, stream).log_event(told)
    assert stream.getvalue().splitlines() == expected


def test_a_terminal_that_was_closed_does_not_end_the_training() -> None:
    class Closed(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    tracker = ConsoleTracker(300, Closed())
    tracker.log(120, FULL)
    tracker.log(130, FULL)
    tracker.close()


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (850.4, "850"), (12345, "12.3k"), (1_200_000, "1.2M"), (3e9, "3.0G")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (41, "0:41"), (3661, "1:01:01")])
def test_clock_times(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (41, "41 s"), (3661, "1 h 1 min"), (360000, "100 h 0 min")]
)
def test_spoken_times(seconds: float, text: str) -> None:
    assert spoken_time(seconds) == text


def test_short_lists() -> None:
    assert short_list([], "layers") == "" and short_list([7, 6, 9, 6], "layers") == "7, 6, 9, 6"
    assert short_list([7, 6, 9, 4, 6], "layers") == "4 to 9 in 5 layers"
