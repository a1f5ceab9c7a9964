"""How long does a `MoELayer` take for the few tokens of a decoding step, beside a dense FFN and the layers of others?

    python -m benchmarks.decode          # two minutes on 2 cores

Layers are in evaluation, under `torch.inference_mode`, and keep no records. In every round each candidate takes the
same batches one after another, of other tokens each; the time is that of one batch on average.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import side_by_side
from benchmarks.layer.candidates import DENSE, DROPPING, Candidate, Cell, build
from benchmarks.layer.loads import measure_load, random_tokens

NUM_EXPERTS, K = 16, 2
CALIBRATION_TOKENS = 2048
"""Set the routers to a mean of `K` experts; the batches are taken from them."""

EXPLANATION = (
    f"Microseconds for one batch, and in brackets how many times the dense FFN's: the least over rounds in which all "
    f"candidates take turns. {NUM_EXPERTS} experts; the mean k of each router at evaluation, where tokens without an "
    f"open gate get an expert, is beside its name. The dense FFN has the FLOPs of {K} experts and that many weights to "
    "read; for several tokens the others read those of more experts. DeepSpeed's layer that drops tokens is left out: "
    "its capacity for so few is another. Peers whose forward pass sums up a loss do so here, too."
)


def decoding(name: str, candidate: Candidate, batches: Sequence[Tensor]) -> Callable[[], dict[str, float]]:
    """All batches, one after another; the seconds of one."""
    module = candidate.module.eval()
    run = module if name.startswith("ours") else candidate.run  # ours would keep records and sum losses up

    @torch.inference_mode()
    def step() -> dict[str, float]:
        watch = side_by_side.Stopwatch(batches[0].device)
        for batch in batches:
            run(batch)
        watch.mark()
        return {"batch": watch.seconds()[0] / len(batches)}

    return step


def measure(cell: Cell, num_tokens: Sequence[int], hidden_size: int, rounds: int) -> Iterator[dict[str, Any]]:
    """All candidates with batches of each size."""
    x = random_tokens(CALIBRATION_TOKENS, hidden_size, getattr(torch, cell.dtype))
    torch.manual_seed(0)
    candidates, left_out = build(cell, x)
    del candidates[DROPPING]
    mean_k = {}
    for name, candidate in candidates.items():
        if name.startswith("ours"):
            mean_k[name] = measure_load(candidate.module.eval(), x).mean_k
    for count in num_tokens:
        batches = list(x[: 16 * count].split(count))
        steps = {name: decoding(name, candidate, batches) for name, candidate in candidates.items()}
        times = side_by_side.plain(side_by_side.take_turns(steps, rounds))
        yield {
            "dtype": cell.dtype,
            "tokens": count,
            "seconds": {name: of["batch"] for name, of in times.items()},
            "mean_k": mean_k,
            "left_out": left_out,
        }


def lines(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The page's table and what it means."""
    yield EXPLANATION
    yield ""
    header = ["", "mean k", *(f"{_tokens(cell)}, {cell['dtype']}" for cell in cells)]
    yield from side_by_side.table(header, [_row(name, cells) for name in cells[0]["seconds"]])
    for name, reason in cells[0]["left_out"].items():
        yield from ("", f"{name} is not there: {reason}")


def _tokens(cell: Mapping[str, Any]) -> str:
    return "1 token" if cell["tokens"] == 1 else f"{cell['tokens']} tokens"


def _row(name: str, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    mean_k = cells[0]["mean_k"].get(name)
    found = [name, "" if mean_k is None else f"{mean_k:.2f}"]
    for cell in cells:
        seconds = cell["seconds"][name]["least"]
        found.append(f"{1e6 * seconds:.0f} ({seconds / cell['seconds'][DENSE]['least']:.2f})")
    return found


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Bars of every candidate, a panel for every size of batch and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(cells[0]["seconds"])
    figure, axes = plt.subplots(1, len(cells), figsize=(2.6 * len(cells) + 2, 3.6), sharey=True, layout="constrained")
    for axis, cell in zip(axes, cells, strict=True):
        values = [1e6 * cell["seconds"][name]["least"] for name in names]
        colours = ["tab:gray" if n == DENSE else "tab:blue" if n.startswith("ours") else "tab:orange" for n in names]
        axis.barh(range(len(names)), values, color=colours)
        axis.set_title(f"{_tokens(cell)}, {cell['dtype']}", fontsize=9)
        axis.set_xlabel("µs for a batch")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle("A decoding step through one layer: dense (grey), ours (blue), others (orange)", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> int:
    parser = side_by_side.parser("decode", __doc__ or "", rounds=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64], help="of a batch, at most 128")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024, help="hidden units of an expert")
    args = parser.parse_args()
    if not 1 <= min(args.tokens) <= max(args.tokens) <= CALIBRATION_TOKENS // 16:
        parser.error(f"--tokens is {args.tokens} but each must be between 1 and {CALIBRATION_TOKENS // 16}.")
    if args.quick:
        args.tokens, args.hidden, args.ffn, args.rounds = [1, 8], 64, 32, 2
    machine, cells = side_by_side.machine(torch.device("cpu")), []
    for dtype in ("float32", "bfloat16"):
        cell = Cell(num_experts=NUM_EXPERTS, k=K, routing="uniform", dtype=dtype, ffn_hidden_size=args.ffn)
        cells += measure(cell, args.tokens, args.hidden, args.rounds)
        gc.collect()
        print(f"{dtype}: done", flush=True)
    results = {"settings": side_by_side.settings(args), "machine": machine, "cells": cells}
    paths = side_by_side.write_page(args.output, "decode", "A decoding step through one layer", results, lines(cells))
    print(*paths, draw(cells, args.output / "decode.png"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
