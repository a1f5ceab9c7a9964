"""The table, the plot and the answers, from the results of the cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.variants import VARIANTS

REFERENCE = "top-2 of 16"
Results = Sequence[Mapping[str, Any]]


def write_report(results: Results, folder: Path, *, machine: Mapping[str, Any]) -> list[Path]:
    """Write `quality.md`'s tables, `quality.json` and `quality.png` into `folder`; give their paths.

    The markdown file between its two marks is replaced, what a person wrote around them is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = "\n".join(_tables(results, machine))
    page, data, plot = (folder / f"quality.{kind}" for kind in ("md", "json", "png"))
    page.write_text(_between_marks(page.read_text() if page.exists() else "", tables))
    data.write_text(json.dumps({"machine": dict(machine), "cells": list(results)}, indent=None))
    draw(results, plot)
    return [page, data, plot]


_BEGIN, _END = "<!-- tables: begin -->", "<!-- tables: end -->"


def _between_marks(page: str, tables: str) -> str:
    if _BEGIN not in page:
        return f"# What the routers are worth\n\n{_BEGIN}\n{tables}\n{_END}\n"
    head, rest = page.split(_BEGIN, 1)
    return f"{head}{_BEGIN}\n{tables}\n{_END}{rest.split(_END, 1)[1]}"


def _tables(results: Results, machine: Mapping[str, Any]) -> Iterator[str]:
    yield "`python -m benchmarks.quality`; " + ", ".join(f"{k} {v}" for k, v in machine.items()) + "."
    for task in dict.fromkeys(result["task"] for result in results):
        of_task = [result for result in results if result["task"] == task]
        once = [result for result in of_task if VARIANTS[result["variant"]].resumed_from is None]
        steps = ", ".join(f"{steps:,}" for steps in dict.fromkeys(result["steps"] for result in of_task))
        yield from ("", f"## {task} ({steps} steps)", "")
        yield from _main_table(once)
        yield from ("", f"### Time to the final loss of {REFERENCE} ({task})", "")
        yield from _time_table(once)
        yield from ("", f"### Against the grid ({task})", "")
        yield from _grid_lines(once)
        yield from ("", f"### Growth ({task})", "")
        yield from _growth_table(of_task)
        if of_task[0]["final"]["judge"]["per_kind"]:
            yield from ("", f"### By question ({task})", "")
            yield from _kind_table(of_task)


def by_variant(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result["variant"], []).append(result)
    return found


def spread(values: Iterable[float], digits: int = 4) -> str:
    """Mean ± half the range."""
    values = list(values)
    mean = sum(values) / len(values)
    half = (max(values) - min(values)) / 2
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def mean_k(final: Mapping[str, Any]) -> float:
    return mean(final["mean_k"].values()) if final["mean_k"] else 1.0


def judged(cells: Results, value: Callable[[Mapping[str, Any]], float]) -> list[float]:
    return [value(cell["final"]["judge"]) for cell in cells]


def _row(*entries: object) -> str:
    return "| " + " | ".join(str(entry) for entry in entries) + " |"


def _main_table(results: Results) -> Iterator[str]:
    yield _row("variant", "seeds", "loss (judge)", "loss (select)", "mean k", "k by layer", "active parameters",
               "live experts", "births / deaths", "busiest share", "load entropy")  # fmt: skip
    yield _row(*["---"] * 11)
    for name, cells in by_variant(results).items():
        first = cells[0]["final"]["judge"]
        layers = list(first["mean_k"])
        yield _row(
            name,
            len(cells),
            spread(judged(cells, lambda final: final["loss"])),
            spread(cell["final"]["select"]["loss"] for cell in cells),
            f"{mean(judged(cells, mean_k)):.2f}" if layers else "–",
            " / ".join(f"{mean(judged(cells, lambda final, at=at: final['mean_k'][at])):.2f}" for at in layers) or "–",
            f"{mean(judged(cells, lambda final: final['active_parameters'])) / 1e3:.1f}k",
            " / ".join(f"{mean(cell['live'][-1][i] for cell in cells):.1f}" for i in range(len(layers))) or "–",
            f"{mean(cell['births'] for cell in cells):.1f} / {mean(cell['deaths'] for cell in cells):.1f}",
            f"{mean(judged(cells, lambda final: max(final['busiest_share'].values()))):.2f}" if layers else "–",
            f"{mean(judged(cells, lambda final: min(final['load_entropy'].values()))):.2f}" if layers else "–",
        )


def _time_table(results: Results) -> Iterator[str]:
    variants = by_variant(results)
    if REFERENCE not in variants:
        return
    goal = mean(cell["curve"][-1]["loss"] for cell in variants[REFERENCE])
    yield f"Loss on `select`, {goal:.4f}. Means over the seeds that reach it; time of training alone, on one core."
    yield ""
    yield _row("variant", "reached by", "steps", "training TFLOPs", "time, s")
    yield _row(*["---"] * 5)
    for name, cells in variants.items():
        reached = [point for cell in cells if (point := first_below(cell["curve"], goal)) is not None]
        values = (
            (
                f"{mean(point['step'] for point in reached):.0f}",
                f"{mean(point['train_flops'] for point in reached) / 1e12:.3f}",
                f"{mean(point['train_s'] for point in reached):.1f}",
            )
            if reached
            else ("–", "–", "–")
        )
        yield _row(name, f"{len(reached)} of {len(cells)}", *values)


def first_below(curve: Sequence[Mapping[str, float]], goal: float) -> dict[str, float] | None:
    """Where the curve first reaches `goal`, interpolated between its points; None if it never does."""
    before: Mapping[str, float] | None = None
    for point in curve:
        if point["loss"] <= goal:
            if before is None:
                return dict(point)
            part = (before["loss"] - goal) / (before["loss"] - point["loss"])
            return {key: before[key] + part * (point[key] - before[key]) for key in point}
        before = point
    return None


def _grid_lines(results: Results) -> Iterator[str]:
    """The DynMoE paper's claim: tuning-free against the mean and the best of the fixed K x k grid.

    The best cells, of all and of those with no more active parameters than a variant (to 2 %, which routers of other
    sizes differ by), are chosen on `select` and compared on `judge`, seed by seed.
    """
    variants = by_variant(results)
    grid = {name: cells for name, cells in variants.items() if VARIANTS[name].group == "grid"}
    if not grid:
        return

    def selected(name: str) -> float:
        return mean(cell["final"]["select"]["loss"] for cell in grid[name])

    best = min(grid, key=selected)
    seeds = set.intersection(*({cell["seed"] for cell in cells} for cells in grid.values()))

    def judge_loss(name: str, seed: int) -> float:
        return next(cell["final"]["judge"]["loss"] for cell in variants[name] if cell["seed"] == seed)

    def minus(name: str, other: str) -> str:
        common = [{cell["seed"] for cell in variants[of]} for of in (name, other)]
        return spread(judge_loss(name, seed) - judge_loss(other, seed) for seed in sorted(common[0] & common[1]))

    def active(name: str) -> float:
        return mean(judged(variants[name], lambda final: final["active_parameters"]))

    grid_mean = {seed: mean(judge_loss(name, seed) for name in grid) for seed in seeds}
    yield (
        f"Mean of the {len(grid)} cells of the grid {mean(grid_mean.values()):.4f}; best cell (chosen on `select`) "
        f"{best}, {mean(judged(grid[best], lambda final: final['loss'])):.4f} with {active(best) / 1e3:.1f}k active "
        "parameters. Differences on `judge`, by seed; negative is better than the grid. The last column is against the "
        "best cell that has no more active parameters (to 2 %)."
    )
    yield ""
    yield _row("variant", "minus mean of the grid", "minus best cell", "active, against best cell",
               "minus best cell of its size")  # fmt: skip
    yield _row(*["---"] * 5)
    for name, cells in variants.items():
        if VARIANTS[name].group in ("grid", "dense"):
            continue
        common = sorted(seeds & {cell["seed"] for cell in cells})
        if common:
            affordable = [cell for cell in grid if active(cell) <= 1.02 * active(name)]
            peer = min(affordable, key=selected, default=None)
            yield _row(
                name,
                spread(judge_loss(name, seed) - grid_mean[seed] for seed in common),
                minus(name, best),
                f"{active(name) / active(best):.2f}x",
                "–" if peer is None else f"{minus(name, peer)} ({peer})",
            )


def _growth_table(results: Results) -> Iterator[str]:
    """Every grown variant against the small pool it starts as and the large one it ends as, at the same router."""
    variants = by_variant(results)
    yield (
        "Differences on `judge`, by seed, from the pool it starts as and from the pool it ends as, for as many steps. "
        "Live experts: mean over training and layers, which is what a pool that follows them would hold in memory."
    )
    yield ""
    yield _row("variant", "loss (judge)", "minus small pool", "minus large pool", "live experts, mean / at the end",
               "training TFLOPs", "time, s")  # fmt: skip
    yield _row(*["---"] * 7)
    shown: tuple[str, ...] = ()
    for name, cells in variants.items():
        if not VARIANTS[name].grows_between:
            continue
        small, large = VARIANTS[name].grows_between
        others = [{cell["seed"]: cell for cell in variants.get(other, [])} for other in (small, large)]

        def minus(at_seed: Mapping[int, Any], cells: Results = cells) -> str:
            pairs = [(cell, at_seed[cell["seed"]]) for cell in cells if cell["seed"] in at_seed]
            losses = ([cell["final"]["judge"]["loss"] for cell in pair] for pair in pairs)
            return spread(ours - theirs for ours, theirs in losses) if pairs else "–"

        for label, of_label in ((f"*{small}*", variants.get(small)), (f"*{large}*", variants.get(large))):
            if of_label and shown != (small, large):
                yield _growth_row(label, of_label, "", "")
        shown = small, large
        yield _growth_row(f"**{name}**", cells, *(minus(other) for other in others))


def _growth_row(label: str, cells: Results, *differences: str) -> str:
    live = [mean(map(mean, cell["live"])) for cell in cells]
    return _row(
        label,
        spread(judged(cells, lambda final: final["loss"])),
        *differences,
        f"{mean(live):.1f} / {mean(mean(cell['live'][-1]) for cell in cells):.1f}",
        f"{mean(cell['curve'][-1]['train_flops'] for cell in cells) / 1e12:.3f}",
        f"{mean(cell['train_s'] for cell in cells):.0f}",
    )


def _kind_table(results: Results) -> Iterator[str]:
    kinds = list(results[0]["final"]["judge"]["per_kind"])
    yield "Accuracy, and mean k of the question's token (by layer) and of the patches, on `judge`."
    yield ""
    questions = [kind.partition("/")[0] for kind in kinds]
    yield _row(
        "variant",
        *(f"{q}: accuracy" for q in questions),
        *(f"{q}: k of question" for q in questions),
        *(f"{q}: k of patches" for q in questions),
    )
    yield _row(*["---"] * (1 + 3 * len(questions)))
    for name, cells in by_variant(results).items():
        layers = list(cells[0]["final"]["judge"]["mean_k"])

        def k_of(kind: str, layer: str, cells: Results = cells) -> str:
            return f"{mean(judged(cells, lambda final: final['mean_k_per_kind'][layer][kind])):.2f}"

        yield _row(
            name,
            *(
                f"{100 * mean(judged(cells, lambda final, kind=kind: final['per_kind'][kind]['accuracy'])):.1f} %"
                for kind in kinds
            ),
            *(" / ".join(k_of(f"{q}/question", layer) for layer in layers) or "–" for q in questions),
            *(" / ".join(k_of(f"{q}/patch", layer) for layer in layers) or "–" for q in questions),
        )


def _range(values: Sequence[float]) -> list[list[float]]:
    """Down to the least and up to the greatest from the mean, as matplotlib wants error bars."""
    return [[max(mean(values) - min(values), 0.0)], [max(max(values) - mean(values), 0.0)]]


def draw(results: Results, path: Path) -> None:
    """Held-out loss against mean active parameters, one panel per data set, bars over the seeds' range.

    Points bear numbers, whose names stand beside the panel in the order of the loss. Variants that were trained longer
    than the others are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in results if VARIANTS[result["variant"]].resumed_from is None]
    tasks = list(dict.fromkeys(result["task"] for result in results))
    if not tasks:
        return
    groups = list(dict.fromkeys(variant.group for variant in VARIANTS.values() if variant.resumed_from is None))
    colours = dict(zip(groups, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(len(tasks), 1, figsize=(12, 7 * len(tasks)), squeeze=False)
    for axis, task in zip(axes[:, 0], tasks, strict=True):
        variants = by_variant([result for result in results if result["task"] == task])
        ordered = sorted(variants.items(), key=lambda item: mean(judged(item[1], lambda final: final["loss"])))
        handles = []
        for number, (name, cells) in enumerate(ordered, 1):
            loss = judged(cells, lambda final: final["loss"])
            active = judged(cells, lambda final: final["active_parameters"] / 1e3)
            x, y = mean(active), mean(loss)
            colour = colours[VARIANTS[name].group]
            axis.errorbar(
                x, y,
                xerr=_range(active), yerr=_range(loss),
                fmt="o", color=colour, elinewidth=0.8, markersize=5,
            )  # fmt: skip
            # To one side and the other in turn: neighbours in loss are often neighbours in place.
            axis.annotate(
                f"{number}", (x, y), xytext=(6 if number % 2 else -6, 0), textcoords="offset points", fontsize=8,
                color=colour, va="center", ha="left" if number % 2 else "right",
            )  # fmt: skip
            label = f"{number:>2}  {name}: {y:.3f}, {x:.0f}k"
            handles.append(plt.Line2D([], [], marker="o", ls="", color=colour, label=label))
        axis.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        axis.set(xscale="log", xlabel="active parameters per token, thousands", title=task)
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks("{x:.0f}")
        axis.set_ylabel("held-out loss on judge, nats (mean and range over seeds)")
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
