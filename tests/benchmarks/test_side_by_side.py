"""What the comparisons share: turns, memory, ranks and pages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.side_by_side import (
    AllocatedBytes,
    RankFailed,
    Spread,
    Stopwatch,
    run_ranks,
    table,
    take_turns,
    write_page,
)

CPU = torch.device("cpu")


def test_all_candidates_run_in_every_round_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def candidate(name: str, seconds: list[float]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            calls.append(name)
            return {"all of it": seconds.pop(0)}

        return run

    times = take_turns({"a": candidate("a", [99.0, 3.0, 1.0, 7.0]), "b": candidate("b", [0.0, 5.0, 6.0, 5.0])}, 3)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert times == {
        "a": {"all of it": Spread(least=1.0, median=3.0, most=7.0)},
        "b": {"all of it": Spread(least=5.0, median=5.0, most=6.0)},
    }


def test_a_stopwatch_counts_from_its_first_mark() -> None:
    watch = Stopwatch(CPU)
    time.sleep(0.02)
    watch.mark()
    watch.mark()
    first, second = watch.seconds()
    assert 0.02 <= first <= second


def test_allocated_bytes_are_counted_at_their_peak() -> None:
    before = torch.ones(1000)
    with AllocatedBytes(CPU) as allocated:
        kept = torch.ones(500)
        there_for_a_while = torch.ones(2000)
        del there_for_a_while, before  # what was there before is not counted when it goes
        another = torch.ones(100)
    assert (allocated.peak, allocated.held) == (4 * 2500, 4 * 600)
    assert kept.numel() + another.numel() == 600


def test_temporaries_inside_an_operation_are_counted() -> None:
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    with AllocatedBytes(CPU) as allocated:
        torch.softmax(x.to(torch.float32) + 1, dim=1).sum()
    assert allocated.peak >= 2 * 4 * 64 * 64 > allocated.held


def test_memory_of_a_second_block_does_not_see_the_first_ones() -> None:
    with AllocatedBytes(CPU):
        first = [torch.ones(4000 + n) for n in range(50)]
    del first
    second = [torch.ones(4000 + n) for n in range(50)]  # at the places of the first
    with AllocatedBytes(CPU) as allocated:
        del second
        kept = torch.ones(100)
    assert (allocated.peak, allocated.held, kept.numel()) == (400, 400, 100)


def sum_of_ranks(value: int) -> int:
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return int(total) + dist.get_rank()


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("what went wrong")
    dist.barrier()


def sleeps_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_ranks_give_their_results_or_say_what_went_wrong() -> None:
    assert run_ranks(sum_of_ranks, 2, 5, timeout_s=300) == [15, 16]
    with pytest.raises(RankFailed, match=r"(?s)Rank 1 of 2 failed:.*what went wrong"):
        run_ranks(fails_on_rank_1, 2, timeout_s=300)


def test_ranks_that_take_too_long_are_ended() -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"Ranks \[.*0.*\] of 2 did not finish within 8 s\."):
        run_ranks(sleeps_on_rank_0, 2, timeout_s=8)
    assert time.monotonic() - began < 50


def test_a_page_keeps_what_a_person_wrote(tmp_path: Path) -> None:
    found = {"settings": {"rounds": 3}, "machine": {"cores": 2}, "numbers": [1]}
    data, page = write_page(tmp_path, "speed", "Speed", found, table(["a", "b"], [[1, "x"]]))
    assert page.read_text().startswith("# Speed\n") and json.loads(data.read_text()) == found
    page.write_text(f"Mine.\n{page.read_text()}And this.\n")
    write_page(tmp_path, "speed", "Speed", {**found, "machine": {"cores": 64}}, ["new"])
    text = page.read_text()
    assert text.startswith("Mine.\n# Speed\n") and text.endswith("And this.\n")
    assert "cores 64" in text and "cores 2." not in text and "| 1 | x |" not in text and "\nnew\n" in text


def test_a_table() -> None:
    assert table(["", "ms"], [["dense", 1.5]]) == ["|  | ms |", "| --- | --- |", "| dense | 1.5 |"]
