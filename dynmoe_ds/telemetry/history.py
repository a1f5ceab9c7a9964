"""The course of a run, read back from its folder: series of numbers and the lives of its experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynmoe_ds.errors import DataError
from dynmoe_ds.telemetry.run_folder import METRICS_FILE, read_adaptation, read_experts, read_metrics

NOT_A_METRIC = ("step", "time_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Values over optimiser steps; a value that was NaN or infinite is float NaN."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLife:
    """One expert of one layer. `died` None: still live at the end. `is_initial`: live when the run started."""

    expert_id: int
    born: int
    died: int | None
    is_initial: bool
    parent_id: int | None
    seeding: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadLine:
    """How many tokens chose each expert of one layer in the steps (`from_step`, `to_step`].

    rows_per_rank: what each rank of an expert-parallel group had to compute of them; empty where it was not recorded.
    """

    from_step: int
    to_step: int
    tokens_per_expert: dict[int, int]
    num_tokens: int
    rows_per_rank: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerHistory:
    """What happened in one layer. The series are empty where nothing was recorded.

    A share is between 0 and 1, and so is the entropy of load. `births` and `deaths` hold (step, number of experts) of
    each event that had any.
    """

    name: str
    lives: list[ExpertLife]
    loads: list[LoadLine]
    live: Series
    mean_k: Series
    unrouted_share: Series
    load_entropy: Series = field(default_factory=lambda: Series(steps=[], values=[]))
    births: list[tuple[int, int]] = field(default_factory=list)
    deaths: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunHistory:
    """A whole run: every metric as a series, every layer, every adaptation event. `last_step` is the last logged."""

    series: dict[str, Series]
    layers: list[LayerHistory]
    events: list[dict[str, Any]]
    last_step: int
    time_s: float | None
    tokens_seen: float | None
    is_tokens_seen_estimated: bool

    def last_live_experts(self) -> list[int]:
        """The last known number of live experts of each layer that has one."""
        return [round(layer.live.values[-1]) for layer in self.layers if _is_known(layer.live)]


def read_history(run_dir: str | Path) -> RunHistory:
    """Read a run folder. Raises: DataError where it is no run folder or one of its lines is broken."""
    path = Path(run_dir)
    if not (path / METRICS_FILE).exists():
        raise DataError(f"{path} has no {METRICS_FILE}. Give the folder that `dynmoe train` wrote (run_dir).")
    metric_lines, expert_lines, events = read_metrics(path), read_experts(path), read_adaptation(path)
    series = _series_by_name(metric_lines)
    last_step = max((line["step"] for line in [*metric_lines, *expert_lines, *events]), default=0)
    names: dict[str, None] = {}  # an ordered set: layers in the order in which the run names them
    for line in [*expert_lines[:1], *events, *expert_lines[-1:]]:
        names.update(dict.fromkeys(line["layers"]))
    names.update(dict.fromkeys(name.split("/", 2)[2] for name in series if name.startswith("moe/live_experts/")))
    tokens_seen, is_estimated = _tokens_seen(series)
    return RunHistory(
        series=series,
        layers=[_layer_history(name, series, expert_lines, events, last_step) for name in names],
        events=events,
        last_step=last_step,
        time_s=metric_lines[-1]["time_s"] if metric_lines else None,
        tokens_seen=tokens_seen,
        is_tokens_seen_estimated=is_estimated,
    )


def _is_known(series: Series) -> bool:
    return bool(series.values) and math.isfinite(series.values[-1])


def _series_by_name(lines: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    series: dict[str, Series] = {}
    for line in lines:
        for name, value in line.items():
            if name not in NOT_A_METRIC:
                one = series.setdefault(name, Series(steps=[], values=[]))
                one.steps.append(line["step"])
                one.values.append(float("nan") if value is None else float(value))
    return series


def _tokens_seen(series: Mapping[str, Series]) -> tuple[float | None, bool]:
    """Tokens trained on, and whether that is an estimate: rate x seconds per step x steps, summed over log lines."""
    if "train/tokens_seen" in series:
        last = series["train/tokens_seen"].values[-1]
        return (None if math.isnan(last) else last), False
    rate, step_time = series.get("train/tokens_per_second"), series.get("train/step_time_s")
    if rate is None or step_time is None or rate.steps != step_time.steps:
        return None, False
    total = 0.0
    for tokens_per_s, time_s, step, before in zip(
        rate.values, step_time.values, rate.steps, [0, *rate.steps], strict=False
    ):
        total += tokens_per_s * time_s * (step - before)
    return (None, False) if math.isnan(total) else (total, True)


def _layer_history(
    name: str,
    series: Mapping[str, Series],
    expert_lines: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    last_step: int,
) -> LayerHistory:
    changes = [(event["step"], event["layers"][name]) for event in events if name in event["layers"]]
    counts = [(line["step"], line["layers"][name]) for line in expert_lines if name in line["layers"]]
    return LayerHistory(
        name=name,
        lives=_lives(changes, counts),
        loads=_loads(counts, [(event["window_steps"], event) for event in events if name in event["layers"]], name),
        live=_live_series(changes, counts, series.get(f"moe/live_experts/{name}"), last_step),
        mean_k=series.get(f"moe/mean_k/{name}") or _shares(counts, lambda one: sum(one["load"].values())),
        unrouted_share=series.get(f"moe/unrouted_share/{name}") or _shares(counts, lambda one: one["num_unrouted"]),
        load_entropy=series.get(f"moe/load_entropy/{name}") or Series(steps=[], values=[]),
        births=[(step, len(change["grown"])) for step, change in changes if change["grown"]],
        deaths=[(step, len(change["pruned"])) for step, change in changes if change["pruned"]],
    )


def _lives(
    changes: Sequence[tuple[int, Mapping[str, Any]]], counts: Sequence[tuple[int, Mapping[str, Any]]]
) -> list[ExpertLife]:
    """The lives by expert id. An expert that is first seen without a recorded birth was there from the start."""
    born: dict[int, tuple[int, Mapping[str, Any] | None]] = {}
    died: dict[int, int] = {}
    for step, change in changes:
        for expert_id in map(int, change["tokens_per_expert"]):
            born.setdefault(expert_id, (0, None))
        for grown in change["grown"]:
            born[grown["expert_id"]] = (step, grown)
        for expert_id in change["pruned"]:
            born.setdefault(expert_id, (0, None))
            died[expert_id] = step
    for _, one in counts:
        for expert_id in map(int, one["load"]):
            born.setdefault(expert_id, (0, None))
    return [
        ExpertLife(
            expert_id=expert_id,
            born=step,
            died=died.get(expert_id),
            is_initial=grown is None,
            parent_id=None if grown is None else grown["parent_id"],
            seeding=None if grown is None else grown["seeding"],
        )
        for expert_id, (step, grown) in sorted(born.items())
    ]


def _loads(
    counts: Sequence[tuple[int, Mapping[str, Any]]], windows: Sequence[tuple[int, Mapping[str, Any]]], name: str
) -> list[LoadLine]:
    """Loads from `experts.jsonl`; from the windows of the adaptation events where that file has none."""
    if counts:
        earlier = [0, *(step for step, _ in counts)]
        return [
            LoadLine(
                from_step=before,
                to_step=step,
                tokens_per_expert={int(expert_id): tokens for expert_id, tokens in one["load"].items()},
                num_tokens=one["num_tokens"],
                rows_per_rank=tuple(one.get("rows_per_rank", ())),
            )
            for before, (step, one) in zip(earlier, counts, strict=False)
        ]
    return [
        LoadLine(
            from_step=event["step"] - window_steps,
            to_step=event["step"],
            tokens_per_expert={int(key): value for key, value in event["layers"][name]["tokens_per_expert"].items()},
            num_tokens=event["layers"][name]["num_tokens"],
        )
        for window_steps, event in windows
    ]


def _live_series(
    changes: Sequence[tuple[int, Mapping[str, Any]]],
    counts: Sequence[tuple[int, Mapping[str, Any]]],
    logged: Series | None,
    last_step: int,
) -> Series:
    """Live experts over steps: exact from the events, else as logged, else the experts that have a load."""
    if changes:
        points = [(0, changes[0][1]["live_before"])]
        points += [(step, change["live_after"]) for step, change in changes]
        points.append((last_step, changes[-1][1]["live_after"]))
        return Series(steps=[step for step, _ in points], values=[float(live) for _, live in points])
    if logged is not None:
        return logged
    return Series(steps=[step for step, _ in counts], values=[float(len(one["load"])) for _, one in counts])


def _shares(counts: Sequence[tuple[int, Mapping[str, Any]]], numerator: Callable[[Mapping[str, Any]], int]) -> Series:
    """`numerator(counts)` per token over steps, leaving out lines without tokens."""
    kept = [(step, numerator(one) / one["num_tokens"]) for step, one in counts if one["num_tokens"]]
    return Series(steps=[step for step, _ in kept], values=[value for _, value in kept])
