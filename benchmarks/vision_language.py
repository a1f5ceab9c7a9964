"""What do experts that grow add to the vision-language demo, beside a dense model and top-2 at equal steps?

    python -m benchmarks.vision_language            # half an hour on 2 cores
    python -m benchmarks.vision_language --seeds 1

The first two stages of `experiment=demo_vl` are trained once, through the launcher on 2 ranks. From the model that they
leave, the third stage is trained as each variant has it, with the same steps, batches and learning rate; `seed` sets
the order of the data and the routers' first weights. A cell that is done is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import side_by_side
from benchmarks.quality.report import spread
from dynmoe_ds.data.digit_questions import write_digit_questions
from dynmoe_ds.telemetry.exact_match_pictures import draw_exact_match_of_runs, exact_match
from dynmoe_ds.telemetry.history import RunHistory, read_history
from dynmoe_ds.telemetry.run_state import finished_steps

EXPERIMENT = "experiment=demo_vl"
FIRST_STAGES = ("demo_projector", "demo_language")
BEFORE = "before the third stage"
ALL = "all"

# Overrides of the third stage by variant. One expert that takes every token whole is the dense FFN.
VARIANTS: dict[str, tuple[str, ...]] = {
    "dense, the same FFNs": (
        "router=top_k", "router.k=1", "model.num_experts=1", "model.num_slots=1", "parallel.ep_size=1",
        "adaptation=none",
    ),
    "dense, the whole decoder": ("adaptation=none", "stage.has_experts=false", "stage.trained=[language_model]"),
    "top-2 of 4": ("router=top_k", "adaptation=none"),
    "top-2 of 8": ("router=top_k", "adaptation=none", "model.num_experts=8"),
    "dynamic": (),
}  # fmt: skip

QUICK = ("training.steps=4", "training.eval_every_steps=4", "training.micro_batch_size=4", "training.eval_sequences=8")


def third_stage(variant: str, seed: int, folder: Path, data: Path) -> list[str]:
    """The overrides of a cell."""
    start = folder / f"{len(FIRST_STAGES)}_{FIRST_STAGES[-1]}" / "model"
    return [
        EXPERIMENT, "stage=demo_experts", *of_data(data), *VARIANTS[variant], f"seed={seed}", f"stage.start={start}",
        f"run_dir={cell_folder(folder, variant, seed)}",
    ]  # fmt: skip


def of_data(data: Path) -> list[str]:
    """The overrides that name the demo's data in the folder `data`."""
    return [
        f"data.path={data}/train.json", f"data.held_out_path={data}/held_out.json", f"data.image_folder={data}/images",
        f"data.tokenizer={data}/tokenizer",
    ]  # fmt: skip


def cell_folder(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant.replace(',', '').replace(' ', '_')}_{seed}"


def run_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train what is not yet there; the results of all cells."""
    folder: Path = args.runs
    data = folder / "data"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {"num_train": 64, "num_held_out": 16} if args.quick else {"num_train": 6000, "num_held_out": 800}
        write_digit_questions(data, **sizes, seed=0)
    quick = list(QUICK) if args.quick else []
    stages = [EXPERIMENT, *of_data(data), f"stages={','.join(FIRST_STAGES)}", f"run_dir={folder}", *quick]
    _dynmoe("stages", stages)
    history = read_history(folder / f"{len(FIRST_STAGES)}_{FIRST_STAGES[-1]}")
    results = [{"variant": BEFORE, "seed": 0, **result(history)}]
    for seed in range(args.seeds):
        for variant in VARIANTS:  # all of a seed one after the other: what slows the machine slows them alike
            run_dir = cell_folder(folder, variant, seed)
            if finished_steps(run_dir) is None:
                _dynmoe("train", [*third_stage(variant, seed, folder, data), *quick])
            results.append({"variant": variant, "seed": seed, **result(read_history(run_dir))})
    return results


def _dynmoe(verb: str, overrides: Sequence[str]) -> None:
    """Raises: subprocess.CalledProcessError if it fails; what it says is on the terminal."""
    subprocess.run([sys.executable, "-m", "dynmoe_ds", verb, *overrides], check=True)


def result(history: RunHistory) -> dict[str, Any]:
    """What a run's end says: JSON's values alone."""
    return {
        "steps": history.last_step,
        "exact_match": exact_match(history),
        "loss": _last(history, "eval/loss"),
        "mean_k": _last(history, "eval/mean_k"),
        "live": [layer.live.values[-1] for layer in history.layers],
        "births": sum(count for layer in history.layers for _, count in layer.births),
        "deaths": sum(count for layer in history.layers for _, count in layer.deaths),
        "active_parameters": _last(history, "eval/active_parameters"),
        "forward_flops_per_token": _last(history, "eval/forward_flops_per_token"),
        "mean_k_per_kind": {
            name.removeprefix(_KIND): series.values[-1]
            for name, series in history.series.items()
            if name.startswith(_KIND) and name.count("/") == _KIND.count("/")
        },
    }


_KIND = "eval/mean_k_per_kind/"


def _last(history: RunHistory, name: str) -> float | None:
    return history.series[name].values[-1] if name in history.series else None


def page_lines(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The Markdown tables."""
    by_variant: dict[str, list[Mapping[str, Any]]] = {}
    for one in results:
        by_variant.setdefault(one["variant"], []).append(one)
    kinds = list(results[0]["exact_match"])
    yield "Held-out questions answered exactly, %: mean over the seeds ± half their range."
    yield ""
    yield from side_by_side.table(
        ["third stage", "seeds", *kinds, "held-out loss"],
        (
            [
                name,
                len(cells),
                *(spread((100 * cell["exact_match"][kind] for cell in cells), 1) for kind in kinds),
                spread((cell["loss"] for cell in cells), 3),
            ]
            for name, cells in by_variant.items()
        ),
    )
    yield ""
    yield "What it costs. Parameters and FLOPs are of one held-out token. Speed is compared in [train.md](train.md)."
    yield ""
    yield from side_by_side.table(
        ["third stage", "mean k", "live experts", "births / deaths", "active parameters", "forward MFLOPs"],
        ([name, *_costs(cells)] for name, cells in by_variant.items()),
    )
    dynamic = by_variant.get("dynamic", [])
    if dynamic:
        yield ""
        yield "Mean k of `dynamic` by kind of token: those of images and of text, by kind of question."
        yield ""
        of_kinds = list(dynamic[0]["mean_k_per_kind"])
        yield from side_by_side.table(
            ["kind", "mean k"],
            ([kind, spread((cell["mean_k_per_kind"][kind] for cell in dynamic), 2)] for kind in of_kinds),
        )


def _costs(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    def over(name: str, unit: float, digits: int) -> str:
        values = [cell[name] / unit for cell in cells if cell[name] is not None]
        return spread(values, digits) if values else "–"

    layers = range(len(cells[0]["live"]))
    yield over("mean_k", 1, 2)
    yield ", ".join(spread((cell["live"][layer] for cell in cells), 1) for layer in layers) or "–"
    yield f"{over('births', 1, 1)} / {over('deaths', 1, 1)}"
    yield over("active_parameters", 1e3, 0) + "k" if cells[0]["active_parameters"] is not None else "–"
    yield over("forward_flops_per_token", 1e6, 2)


def draw(results: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """Bars by kind of question, one colour per variant: means over the seeds."""
    shares: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(one["variant"] for one in results):
        cells = [one["exact_match"] for one in results if one["variant"] == name]
        shares[name] = {kind: statistics.fmean(of[kind] for of in cells) for kind in cells[0]}
    (picture,) = draw_exact_match_of_runs(shares)
    file.write_bytes(picture.png)
    return file


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vision_language",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the third stage (default 3)")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_vision_language"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the page")
    parser.add_argument("--quick", action="store_true", help="a few steps: whether everything runs (minutes)")
    args = parser.parse_args(None if argv is None else list(argv))
    machine = side_by_side.machine(torch.device("cpu"))
    results = run_cells(args)
    settings = {key: value for key, value in vars(args).items() if key in ("seeds", "quick")}
    found = {"machine": machine, "settings": settings, "cells": results}
    paths = side_by_side.write_page(
        args.output, "vision_language", "Vision-language: dynamic, dense and top-2", found, page_lines(results)
    )
    paths.append(draw(results, args.output / "vision_language.png"))
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
