"""Loads over time as grids of numbers, a column for the steps between two records: what the heat maps draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dynmoe_ds.telemetry.history import LayerHistory, LoadLine

MAX_COLUMNS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadGrid:
    """rows [experts or ranks][columns], NaN where nothing is known; column i is of the steps (edges[i], edges[i + 1]].

    note: the caption's sentences where records were merged; steps between two of them, of which nothing is known, then
    have the column's colour.
    """

    edges: list[int]
    rows: list[list[float]]
    note: str

    @property
    def known(self) -> list[float]:
        """Every number that is one."""
        return [value for row in self.rows for value in row if math.isfinite(value)]

    @property
    def has_gaps(self) -> bool:
        """Whether something is not known."""
        return any(not math.isfinite(value) for row in self.rows for value in row)


def expert_grid(loads: Sequence[LoadLine], expert_ids: Sequence[int]) -> LoadGrid:
    """Percent of the layer's tokens that chose each expert; NaN where it did not live, or nobody could choose."""

    def of(line: LoadLine) -> list[float]:
        counts = [line.tokens_per_expert.get(expert_id, math.nan) for expert_id in expert_ids]
        return [100 * count / line.num_tokens if line.num_tokens else math.nan for count in counts]

    return _over_steps(loads, of)


def rank_grid(loads: Sequence[LoadLine]) -> LoadGrid:
    """Rows of each rank over the mean of all: 1 is an equal share; NaN where a rank did not take part, or nobody had
    rows. A run that went on with another number of ranks has as many rows as with the most.
    """
    most = max((len(line.rows_per_rank) for line in loads), default=0)

    def of(line: LoadLine) -> list[float]:
        rows, total = line.rows_per_rank, sum(line.rows_per_rank)
        shares = [one * len(rows) / total if total else math.nan for one in rows]
        return shares + [math.nan] * (most - len(rows))

    return _over_steps(loads, of)


def loads_of_layers(layers: Iterable[LayerHistory]) -> list[LoadLine]:
    """The rows of each rank in all layers together; of experts nothing, as every layer has its own."""
    at_step: dict[int, list[LoadLine]] = {}
    for layer in layers:
        for line in layer.loads:
            at_step.setdefault(line.to_step, []).append(line)
    return [
        LoadLine(
            from_step=lines[0].from_step,
            to_step=step,
            tokens_per_expert={},
            num_tokens=0,
            rows_per_rank=_sum_by_rank(lines),
        )
        for step, lines in sorted(at_step.items())
    ]


def merged_loads(loads: Sequence[LoadLine], at_most: int) -> list[LoadLine]:
    """The same loads in at most so many lines: neighbours are added up."""
    size = math.ceil(len(loads) / at_most)
    merged = []
    for start in range(0, len(loads), size):
        part = loads[start : start + size]
        tokens: dict[int, int] = {}
        for line in part:
            for expert_id, count in line.tokens_per_expert.items():
                tokens[expert_id] = tokens.get(expert_id, 0) + count
        merged.append(
            LoadLine(
                from_step=part[0].from_step,
                to_step=part[-1].to_step,
                tokens_per_expert=tokens,
                num_tokens=sum(line.num_tokens for line in part),
                rows_per_rank=_sum_by_rank(part),
            )
        )
    return merged


def _sum_by_rank(lines: Sequence[LoadLine]) -> tuple[int, ...]:
    """Nothing of lines of different numbers of ranks."""
    of_lines = [line.rows_per_rank for line in lines]
    return tuple(map(sum, zip(*of_lines, strict=True))) if len({len(rows) for rows in of_lines}) == 1 else ()


def _over_steps(loads: Sequence[LoadLine], column_of: Callable[[LoadLine], list[float]]) -> LoadGrid:
    merged = merged_loads(loads, MAX_COLUMNS)
    edges, columns = [merged[0].from_step], []
    for line in merged:
        column = column_of(line)
        if line.from_step > edges[-1]:  # windows of adaptations may have gaps between them
            edges.append(line.from_step)
            columns.append([math.nan] * len(column))
        edges.append(line.to_step)
        columns.append(column)
    is_merged = len(merged) < len(loads)
    note = f" {len(loads)} recordings are merged into {len(merged)} columns." if is_merged else ""
    if is_merged and any(after.from_step > line.to_step for line, after in pairwise(loads)):
        note += " Steps between recordings of a column, of which nothing is known, have its colour."
    return LoadGrid(edges=edges, rows=[list(row) for row in zip(*columns, strict=True)], note=note)
