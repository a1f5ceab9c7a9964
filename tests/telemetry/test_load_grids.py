"""Loads as grids, against worked examples."""

from __future__ import annotations

from math import nan

import pytest

from dynmoe_ds.telemetry.history import LayerHistory, LoadLine, Series
from dynmoe_ds.telemetry.load_grids import MAX_COLUMNS, expert_grid, loads_of_layers, merged_loads, rank_grid


def line(steps: tuple[int, int], load: dict[int, int], num_tokens: int, rows: tuple[int, ...] = ()) -> LoadLine:
    return LoadLine(
        from_step=steps[0], to_step=steps[1], tokens_per_expert=load, num_tokens=num_tokens, rows_per_rank=rows
    )


def test_a_row_per_expert_with_its_share_of_the_tokens_while_it_lived() -> None:
    """Expert 1 dies and expert 2 is born in the second line; nothing is known of 20 to 30; nobody chooses last."""
    loads = [
        line((0, 10), {0: 30, 1: 10}, 40),
        line((10, 20), {0: 20, 1: 5, 2: 15}, 40),
        line((30, 40), {0: 0, 2: 100}, 80),
        line((40, 50), {0: 0, 2: 0}, 0),
    ]
    grid = expert_grid(loads, [0, 1, 2])
    assert grid.edges == [0, 10, 20, 30, 40, 50]
    expected = [[75, 50, nan, 0, nan], [25, 12.5, nan, nan, nan], [nan, 37.5, nan, 125, nan]]
    for row, wanted in zip(grid.rows, expected, strict=True):
        assert row == pytest.approx(wanted, nan_ok=True)
    assert grid.known == [75, 50, 0, 25, 12.5, 37.5, 125] and grid.has_gaps and grid.note == ""
    assert expert_grid(loads, [2]).rows[0] == pytest.approx(expected[2], nan_ok=True), "only those that are asked for"


def test_a_row_per_rank_with_its_rows_over_the_mean() -> None:
    """The run goes on on two ranks instead of three after step 20; in the last steps nobody has rows."""
    rows = [(6, 2, 1), (0, 0, 9), (3, 1), (), (0, 0)]
    loads = [line((10 * i, 10 * i + 10), {}, 9, of_ranks) for i, of_ranks in enumerate(rows)]
    grid = rank_grid(loads)
    expected = [[2, 0, 1.5, nan, nan], [2 / 3, 0, 0.5, nan, nan], [1 / 3, 3, nan, nan, nan]]
    for row, wanted in zip(grid.rows, expected, strict=True):
        assert row == pytest.approx(wanted, nan_ok=True)
    assert not rank_grid(loads[:2]).has_gaps and rank_grid([line((0, 1), {0: 1}, 1)]).rows == []


def layer(*loads: LoadLine) -> LayerHistory:
    none = Series(steps=[], values=[])
    return LayerHistory(name="a", lives=[], loads=list(loads), live=none, mean_k=none, unrouted_share=none)


def test_all_layers_together_have_the_rows_of_each() -> None:
    first = layer(line((0, 10), {0: 16}, 16, (9, 7)), line((10, 20), {0: 8}, 16, (4, 4)))
    second = layer(line((0, 10), {0: 12}, 16, (9, 3)), line((10, 20), {0: 8}, 16, (0, 8)))
    together = loads_of_layers([first, second])
    assert [(one.from_step, one.to_step, one.rows_per_rank) for one in together] == [
        (0, 10, (18, 10)),
        (10, 20, (4, 12)),
    ]
    assert rank_grid(together).rows == [[18 / 14, 4 / 8], [10 / 14, 12 / 8]]


def test_merged_loads_add_up() -> None:
    loads = [line((step, step + 1), {0: 1, step: 2}, 10, (step, 1)) for step in range(1, 6)]
    merged = merged_loads(loads, 3)
    assert [(one.from_step, one.to_step, one.num_tokens) for one in merged] == [(1, 3, 20), (3, 5, 20), (5, 6, 10)]
    assert merged[0].tokens_per_expert == {0: 2, 1: 2, 2: 2}
    assert [one.rows_per_rank for one in merged] == [(3, 2), (7, 2), (5, 1)]
    assert merged_loads(loads, 5) == loads
    assert merged_loads([*loads[:1], line((2, 3), {}, 1, (1, 1, 1))], 1)[0].rows_per_rank == (), "of other ranks"


def test_a_long_run_has_no_more_columns_than_can_be_seen() -> None:
    loads = [line((step, step + 1), {0: 1}, 2, (3, 1)) for step in range(2 * MAX_COLUMNS)]
    for grid in (expert_grid(loads, [0]), rank_grid(loads)):
        assert grid.edges == list(range(0, 2 * MAX_COLUMNS + 1, 2))
        assert grid.note == f" {2 * MAX_COLUMNS} recordings are merged into {MAX_COLUMNS} columns."
    with_gaps = [line((2 * step, 2 * step + 1), {0: 1}, 2) for step in range(2 * MAX_COLUMNS)]
    assert "of which nothing is known" in expert_grid(with_gaps, [0]).note
    assert set(expert_grid(loads, [0]).rows[0]) == {50.0} and set(rank_grid(loads).rows[1]) == {0.5}
