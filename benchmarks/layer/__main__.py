"""What do forward, backward and memory of a `MoELayer` cost beside a dense FFN of equal FLOPs and the layers of others?

    python -m benchmarks.layer                                   # the default cells, about half an hour on 2 cores
    python -m benchmarks.layer --experts 16 64 --k 2 4 --routing skewed --dtype bfloat16     # all combinations of these

Pages beside the one of the default cells:
docs/results/layer_targets, the cells that the targets name, 8 minutes: `--experts 16 --k 2 6 --routing uniform skewed
--dtype float32 bfloat16 --without-peers --rounds 16`
docs/results/layer_tokens, four times the tokens, 15 minutes: `--experts 16 --k 2 6 --routing uniform --dtype float32
bfloat16 --tokens 8192`

A cell is a number of experts, a mean k, a routing and a dtype. All candidates of a cell have experts of equal sizes and
values and, as far as their routers allow, equal loads. Before a cell is timed, the peers that route as ours does must
give our layer's output and gradient in float32.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import side_by_side
from benchmarks.layer.candidates import Candidate, Cell, build, check_equal_outputs
from benchmarks.layer.loads import random_tokens
from benchmarks.layer.report import write_report

TOTAL_FFN = 16384
"""Hidden units of all experts together beyond 16 experts: more experts are smaller ones, of as many weights in all."""

CHECKED_TOKENS = 256


def default_cells() -> Iterator[dict[str, Any]]:
    """Each axis by itself, around 16 experts of which a token takes 2 or 6."""
    for k, routing, dtype in itertools.product((2, 6), ("uniform", "skewed"), ("float32", "bfloat16")):
        yield {"num_experts": 16, "k": k, "routing": routing, "dtype": dtype}
    for num_experts, k in ((16, 1), (16, 8), (8, 4), (4, 2), (64, 8), (64, 32), (128, 16), (128, 64)):
        yield {"num_experts": num_experts, "k": k, "routing": "uniform", "dtype": "float32"}
    for num_experts, k in ((4, 2), (64, 8)):
        yield {"num_experts": num_experts, "k": k, "routing": "skewed", "dtype": "float32"}
        yield {"num_experts": num_experts, "k": k, "routing": "uniform", "dtype": "bfloat16"}


def chosen_cells(args: argparse.Namespace) -> list[Cell]:
    """The cells that the command line asks for."""
    axes = {"num_experts": args.experts, "k": args.k, "routing": args.routing, "dtype": args.dtype}
    if any(values is not None for values in axes.values()):
        defaults = {"num_experts": [16], "k": [2], "routing": ["uniform"], "dtype": ["float32"]}
        lists = [values or defaults[name] for name, values in axes.items()]
        wanted = [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]
    elif args.quick:
        wanted = [
            {"num_experts": 4, "k": 2, "routing": "skewed", "dtype": "float32"},
            {"num_experts": 8, "k": 2, "routing": "uniform", "dtype": "bfloat16"},
        ]
    else:
        wanted = list(default_cells())
    for cell in wanted:
        if not 1 <= cell["k"] < cell["num_experts"]:
            sys.exit(f"k is {cell['k']} with {cell['num_experts']} experts but must be at least 1 and less than them.")
    return [Cell(**cell, ffn_hidden_size=_ffn_hidden_size(args.ffn, cell["num_experts"])) for cell in wanted]


def _ffn_hidden_size(largest: int, num_experts: int) -> int:
    """`largest`, or less where there are many experts."""
    return min(largest, max(TOTAL_FFN * largest // 1024 // num_experts, 16))


def training_step(candidate: Candidate, x: Tensor) -> Callable[[], dict[str, float]]:
    """A forward and backward pass, as it is timed; gradients are there when it is done."""

    def step() -> dict[str, float]:
        candidate.module.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        watch = side_by_side.Stopwatch(x.device)
        y, aux_loss = candidate.run(leaf)
        loss = y.square().mean()
        loss = loss if aux_loss is None else loss + aux_loss
        watch.mark()
        loss.backward()
        watch.mark()
        forward, both = watch.seconds()
        return {"forward": forward, "forward + backward": both}

    return step


def measure(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """All candidates of one cell."""
    device = torch.device(args.device)
    x = random_tokens(args.tokens, args.hidden, getattr(torch, cell.dtype)).to(device)
    torch.manual_seed(0)
    deviations = check_equal_outputs(cell, x[:CHECKED_TOKENS])
    gc.collect()
    candidates, left_out = build(cell, x, with_peers=not args.without_peers)
    steps = {name: training_step(candidate, x) for name, candidate in candidates.items()}
    times = side_by_side.plain(side_by_side.take_turns(steps, args.rounds))
    rows = {}
    for name, candidate in candidates.items():
        candidate.module.zero_grad(set_to_none=True)
        with side_by_side.AllocatedBytes(device) as allocated:
            steps[name]()
        gradients = [param.grad for param in candidate.module.parameters() if param.grad is not None]
        candidate.module.zero_grad(set_to_none=True)
        rows[name] = {
            "seconds": times[name],
            "peak_bytes": allocated.peak,
            "gradient_bytes": sum(grad.numel() * grad.element_size() for grad in gradients),
            "mean_k": candidate.load.mean_k if candidate.load else None,
            "busiest": candidate.load.busiest if candidate.load else None,
            "dropped": candidate.dropped,
            "deviation": deviations.get(name),
        }
    cell_values = {name: getattr(cell, name) for name in ("num_experts", "k", "ffn_hidden_size", "routing", "dtype")}
    return {**cell_values, "label": cell.label, "candidates": rows, "left_out": left_out}


def main() -> int:
    parser = side_by_side.parser("layer", __doc__ or "", rounds=4)
    parser.add_argument("--experts", type=int, nargs="+", metavar="E")
    parser.add_argument("--k", type=int, nargs="+", help="mean number of experts per token")
    parser.add_argument("--routing", nargs="+", choices=("uniform", "skewed"), help="skewed: one expert at 4x the mean")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument(
        "--ffn", type=int, default=1024, help="hidden units of an expert; beyond 16 experts less, all together as many"
    )
    parser.add_argument("--without-peers", action="store_true", help="the dense FFN and ours alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda has not been tried on any GPU")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.hidden, args.ffn, args.rounds = 256, 64, 64, 2
    torch.set_num_threads(args.threads)
    machine = side_by_side.machine(torch.device(args.device))
    cells, found = chosen_cells(args), []
    for number, cell in enumerate(cells, 1):
        began = time.perf_counter()
        found.append(measure(cell, args))
        gc.collect()
        print(f"{number}/{len(cells)}  {cell.label}: {time.perf_counter() - began:.0f} s", flush=True)
    for path in write_report(
        {"settings": side_by_side.settings(args), "machine": machine, "cells": found}, args.output
    ):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
