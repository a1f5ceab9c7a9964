"""What does it cost to bring tokens to other ranks and back: padded, a row per expert, and as the layer does it?

    python -m benchmarks.dispatch                                # 2, 4 and 8 gloo ranks of this machine, minutes
    python -m benchmarks.dispatch --ranks 4 --k 2 6 --experts 32

Every rank has its own tokens and every expert is on one rank. The same routing goes through all methods, with forward
and backward pass. Bytes are counted where they are handed to torch.distributed.all_to_all_single, those to other ranks
alone, and are sums over all ranks. Ranks share this machine's cores and its memory is their network: times say what a
method costs in copies and waits, not how fast a network would be.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dynmoe_ds as dm
from benchmarks import side_by_side
from benchmarks.layer.loads import wanted_shares
from dynmoe_ds.distributed import Flight, Parcel, Splits, exchange_counts
from dynmoe_ds.experts import Experts

PADDED, PER_EXPERT, OURS = "padded", "per expert", "MoELayer"
METHODS = (PADDED, PER_EXPERT, OURS)
PASSES = ("forward", "backward")

EXPLANATION = (
    "Bytes of one layer, forward and backward, to other ranks, summed over all ranks. `least` is the closed form: a "
    "token's row once for every other rank with an expert of its, and one row back, twice again in the backward pass. "
    "Rows are tensors of the hidden width; counts, weights and their like are metadata, here as a share of the rows. "
    "Times are minima over rounds of the slowest rank, with the greatest in brackets; small experts are part of them. "
    "`padded` gives each expert as many places per rank as the busiest (rank, expert) pair has tokens, `per expert` "
    "sends a row for every chosen expert, `MoELayer` is what the layer does."
)


class BytesOnTheWire:
    """Counts inside its `with` block what this rank sends to others through torch.distributed.all_to_all_single.

    rows, metadata: bytes by pass, `forward` or `backward`; which one it is, `passing` says. Floating tensors [*, D] of
    the hidden width D are rows. Raises: RuntimeError where tensors go through torch.distributed.all_to_all, which is
    not counted.
    """

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        self.passing = "forward"
        self.rows = dict.fromkeys(PASSES, 0)
        self.metadata = dict.fromkeys(PASSES, 0)

    def __enter__(self) -> BytesOnTheWire:
        self._originals = dist.all_to_all_single, dist.all_to_all
        dist.all_to_all_single, dist.all_to_all = self._count, self._refuse
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        dist.all_to_all_single, dist.all_to_all = self._originals

    def _count(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        splits = input_split_sizes or [len(input) // size] * size
        bytes_per_row = input[:1].numel() * input.element_size() if len(input) else 0
        sent = bytes_per_row * (sum(splits) - splits[rank])
        is_rows = input.dim() >= 2 and input.shape[-1] == self._hidden_size and input.is_floating_point()
        (self.rows if is_rows else self.metadata)[self.passing] += sent
        return self._originals[0](output, input, output_split_sizes, input_split_sizes, group, async_op)

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("torch.distributed.all_to_all was called, whose bytes are not counted here.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """k: mean number of experts per token. routing: `uniform` or `skewed`, with one expert at 4 times the mean load."""

    num_experts: int
    k: int
    routing: str

    @property
    def label(self) -> str:
        return f"E {self.num_experts}, {self.routing}"


class GivenRouting(nn.Module):
    """Takes a router's place: the same `routing` for whatever comes."""

    def __init__(self, mask: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.mask, self.weights = mask, weights

    def forward(self, hidden: Tensor, active: Tensor, real: Tensor | None) -> dm.Routing:
        unrouted = ~self.mask.any(1)
        return dm.Routing(mask=self.mask, weights=self.weights, aux_losses={}, unrouted=unrouted)


def draw_routing(cell: Cell, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mask [T, E], every expert chosen by itself with its share as probability, and even weights [T, E]."""
    generator = torch.Generator().manual_seed(seed)
    shares = wanted_shares(cell.num_experts, cell.k, cell.routing)
    mask = torch.rand(num_tokens, cell.num_experts, generator=generator) < shares
    weights = mask.float() / mask.sum(1, keepdim=True).clamp_min(1)
    return mask, weights.requires_grad_()


def least_rows(mask: Tensor, num_ranks: int, rank: int) -> int:
    """Rows that must leave this rank in one direction: per token, the other ranks that have an expert of its."""
    has_expert = mask.view(len(mask), num_ranks, -1).any(2)
    return int(has_expert.sum() - has_expert[:, rank].sum())


def _exchange(
    tensors: tuple[Tensor, ...], sent: list[int], received: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Send `sent[p]` rows of each tensor to rank p, and wait for what the others send."""
    splits = Splits(sent=sent, received=received)
    return Flight([Parcel(tensor=tensor, splits=splits) for tensor in tensors], group).wait()


def run_padded(hidden: Tensor, mask: Tensor, weights: Tensor, experts: Experts, group: dist.ProcessGroup) -> Tensor:
    """Outputs [T, D] by equal splits: C places for every expert on every rank, C the greatest count of all ranks."""
    num_tokens, num_experts = mask.shape
    counts = mask.sum(0)
    greatest = counts.max()
    dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=group)
    capacity = int(greatest)
    expert, token = mask.T.nonzero(as_tuple=True)
    place = expert * capacity + (mask.cumsum(0) - 1).T[mask.T]
    places = hidden.new_zeros(num_experts * capacity, hidden.shape[1]).index_copy(0, place, hidden[token])
    size = group.size()
    splits = [len(places) // size] * size
    (rows,) = _exchange((places,), splits, splits, group)  # [source rank, local expert, place]
    local = num_experts // size
    by_expert = rows.view(size, local, capacity, -1).transpose(0, 1).reshape(len(rows), -1)
    outputs = experts(by_expert, weights.new_ones(len(rows)), torch.full((local,), size * capacity))
    outputs = outputs.view(local, size, capacity, -1).transpose(0, 1).reshape(len(rows), -1)
    (outputs,) = _exchange((outputs,), splits, splits, group)
    weighted = outputs[place] * weights.T[mask.T][:, None]
    return hidden.new_zeros(num_tokens, hidden.shape[1]).index_add(0, token, weighted)


def run_per_expert(hidden: Tensor, mask: Tensor, weights: Tensor, experts: Experts, group: dist.ProcessGroup) -> Tensor:
    """Outputs [T, D] by a row for every chosen expert, its weight beside it; nothing is padded."""
    size = group.size()
    expert, token = mask.T.nonzero(as_tuple=True)  # sorted by expert, and so by rank
    sent = torch.bincount(expert, minlength=mask.shape[1]).view(size, -1)
    received = exchange_counts(sent, group)
    splits, received_splits = sent.sum(1).tolist(), received.sum(1).tolist()
    rows, row_weights = _exchange((hidden[token], weights.T[mask.T]), splits, received_splits, group)
    local = torch.arange(received.shape[1]).repeat(size).repeat_interleave(received.flatten())
    order = local.argsort(stable=True)
    outputs = experts(rows[order], row_weights[order], received.sum(0))
    outputs = torch.empty_like(outputs).index_copy(0, order, outputs)
    (outputs,) = _exchange((outputs,), received_splits, splits, group)
    return torch.zeros_like(hidden).index_add(0, token, outputs)


def build_layer(cell: Cell, tokens: int, hidden_size: int, ffn: int) -> tuple[dm.MoELayer, Tensor, Tensor, Tensor]:
    """A layer over all ranks with a given routing, and this rank's rows [T, D], mask [T, E] and weights [T, E]."""
    rank = dist.get_rank()
    hidden = torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    mask, weights = draw_routing(cell, tokens, seed=1000 + rank)
    layer = dm.MoELayer(
        hidden_size=hidden_size, ffn_hidden_size=ffn, num_experts=cell.num_experts, num_slots=cell.num_experts,
        ep_size=dist.get_world_size(), seed=0,
    )  # fmt: skip
    layer.router = GivenRouting(mask, weights)
    return layer, hidden, mask, weights


def measure(cells: Sequence[Cell], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One rank: all cells, each with bytes and times by method, equal on all ranks. Collective: every rank."""
    return [measure_cell(cell, args) for cell in cells]


def measure_cell(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """One cell. Raises: AssertionError if the methods differ in output or gradients, or less is sent than must be."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layer, hidden, mask, weights = build_layer(cell, args.tokens, args.hidden, args.ffn)
    group = dist.group.WORLD
    assert group is not None
    runs: dict[str, Callable[[], Tensor]] = {
        PADDED: lambda: run_padded(hidden, mask, weights, layer.experts, group),
        PER_EXPERT: lambda: run_per_expert(hidden, mask, weights, layer.experts, group),
        OURS: lambda: layer(hidden),
    }
    least = 4 * hidden.element_size() * args.hidden * _sum_over_ranks([least_rows(mask, size, rank)])[0]
    found: dict[str, Any] = {"least_bytes": least, "methods": {}}
    wanted: list[Tensor] | None = None
    for name, run in runs.items():
        got, counted = _counted(run, hidden, weights, layer)
        wanted = got if wanted is None else wanted
        _assert_equal(name, got, wanted)
        both = [[counted.rows[one], counted.metadata[one]] for one in PASSES]
        sums = _sum_over_ranks(list(itertools.chain(*both)))
        found["methods"][name] = {
            one: {"row_bytes": rows, "metadata_bytes": metadata}
            for one, rows, metadata in zip(PASSES, sums[::2], sums[1::2], strict=True)
        }
        assert sum(sums[::2]) >= least, f"{cell}, {name}: {sums[::2]} bytes of rows, but {least} must travel"
    times = side_by_side.take_turns(
        {name: timed(run, hidden, weights, layer) for name, run in runs.items()}, args.rounds
    )
    for name, seconds in side_by_side.plain(times).items():
        found["methods"][name]["seconds"] = seconds
    values = {"ranks": size, "num_experts": cell.num_experts, "k": cell.k, "routing": cell.routing}
    return values | {"mean_k": _sum_over_ranks([int(mask.sum())])[0] / size / args.tokens} | found


def _clear(hidden: Tensor, weights: Tensor, layer: nn.Module) -> None:
    hidden.grad = weights.grad = None
    layer.zero_grad(set_to_none=True)


def _counted(
    run: Callable[[], Tensor], hidden: Tensor, weights: Tensor, layer: dm.MoELayer
) -> tuple[list[Tensor], BytesOnTheWire]:
    """Output and gradients of one pass forward and backward, and the bytes that it sent."""
    _clear(hidden, weights, layer)
    with BytesOnTheWire(hidden.shape[1]) as counted:
        y = run()
        counted.passing = "backward"
        y.square().sum().backward()
    grads = [hidden.grad, weights.grad, *(param.grad for param in layer.experts.parameters())]
    return [y.detach(), *(grad for grad in grads if grad is not None)], counted


def _assert_equal(name: str, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert len(got) == len(wanted), f"{name} has {len(got)} of {len(wanted)} gradients"
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max(), f"{name} is off by {(a - b).abs().max()}"


def timed(
    run: Callable[[], Tensor], hidden: Tensor, weights: Tensor, layer: nn.Module
) -> Callable[[], dict[str, float]]:
    """Seconds of the slowest rank."""

    def step() -> dict[str, float]:
        _clear(hidden, weights, layer)
        dist.barrier()
        began = time.perf_counter()
        run().square().sum().backward()
        seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return {"forward + backward": seconds.item()}

    return step


def _sum_over_ranks(numbers: list[int]) -> list[int]:
    total = torch.tensor(numbers)
    dist.all_reduce(total)
    return total.tolist()


def row_bytes(cell: Mapping[str, Any], method: str) -> int:
    """Both passes."""
    return sum(cell["methods"][method][one]["row_bytes"] for one in PASSES)


def metadata_bytes(cell: Mapping[str, Any], method: str) -> int:
    """Both passes."""
    return sum(cell["methods"][method][one]["metadata_bytes"] for one in PASSES)


def lines(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The tables, one for every number of ranks."""
    yield EXPLANATION
    for size in dict.fromkeys(cell["ranks"] for cell in cells):
        yield from ("", f"## {size} ranks", "")
        header = ["experts", "routing", "mean k", "least, MB"]
        header += [f"{method}: rows / least" for method in METHODS]
        header += [f"{method}: metadata" for method in METHODS]
        header += [f"{method}, ms" for method in METHODS] + [f"{OURS} / {PER_EXPERT}, time"]
        yield from side_by_side.table(header, [_row(cell) for cell in cells if cell["ranks"] == size])


def _row(cell: Mapping[str, Any]) -> list[str]:
    seconds = {method: cell["methods"][method]["seconds"]["forward + backward"] for method in METHODS}
    return [
        f"{cell['num_experts']}",
        cell["routing"],
        f"{cell['mean_k']:.2f}",
        f"{cell['least_bytes'] / 1e6:.2f}",
        *(f"{row_bytes(cell, method) / cell['least_bytes']:.3f}" for method in METHODS),
        *(f"{100 * metadata_bytes(cell, method) / row_bytes(cell, method):.2f} %" for method in METHODS),
        *(f"{1e3 * seconds[method]['least']:.1f} ({1e3 * seconds[method]['most']:.1f})" for method in METHODS),
        f"{seconds[OURS]['least'] / seconds[PER_EXPERT]['least']:.2f}",
    ]


def draw(cells: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Two pictures over k, bytes as multiples of the least and times; a row of panels per pool, a column per ranks."""
    times = {
        method: [1e3 * cell["methods"][method]["seconds"]["forward + backward"]["least"] for cell in cells]
        for method in METHODS
    }
    sent = {
        method: [(row_bytes(cell, method) + metadata_bytes(cell, method)) / cell["least_bytes"] for cell in cells]
        for method in METHODS
    }
    what = "Bytes that one layer sends to other ranks, forward + backward, over the least that must travel"
    return [
        _draw_panels(cells, sent, folder / "dispatch.png", what, "bytes / least", is_ratio=True),
        _draw_panels(
            cells, times, folder / "dispatch_time.png", "Time of one layer, forward + backward, slowest rank", "ms",
            is_ratio=False,
        ),
    ]  # fmt: skip


def _draw_panels(
    cells: Sequence[Mapping[str, Any]],
    values: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
    label: str,
    *,
    is_ratio: bool,
) -> Path:
    """values: by method, one per cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(cell["ranks"] for cell in cells))
    kinds = list(dict.fromkeys((cell["num_experts"], cell["routing"]) for cell in cells))
    # Later ones are smaller, so that methods of equal values are all seen.
    styles = dict(zip(METHODS, (("tab:red", 5), ("tab:orange", 9), ("tab:blue", 4)), strict=True))
    figure, axes = plt.subplots(
        len(kinds), len(sizes), figsize=(3.6 * len(sizes), 2.4 * len(kinds) + 1), squeeze=False, sharex=True,
        sharey=is_ratio, layout="constrained",
    )  # fmt: skip
    for (y, kind), (x, size) in itertools.product(enumerate(kinds), enumerate(sizes)):
        axis = axes[y, x]
        shown = [
            i for i, cell in enumerate(cells)
            if (cell["num_experts"], cell["routing"]) == kind and cell["ranks"] == size
        ]  # fmt: skip
        shown.sort(key=lambda i: cells[i]["k"])
        k = [cells[i]["k"] for i in shown]
        for method, (colour, marker_size) in styles.items():
            axis.plot(k, [values[method][i] for i in shown], "o-", color=colour, markersize=marker_size, label=method)
        if is_ratio:
            axis.axhline(1.0, color="black", linestyle=":", linewidth=2, label="least that must travel")
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_title(f"{size} ranks, {kind[0]} experts, {kind[1]}", fontsize=9)
        axis.set_xticks(k)
        if x == 0:
            axis.set_ylabel(label)
        if y == len(kinds) - 1:
            axis.set_xlabel("mean experts per token, k")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> int:
    parser = side_by_side.parser("dispatch", __doc__ or "", rounds=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64], metavar="E", help="multiples of the ranks")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8], help="mean number of experts per token")
    parser.add_argument("--routing", nargs="+", choices=("uniform", "skewed"), default=["uniform", "skewed"])
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=32, help="hidden units of an expert; few, as transport is timed")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds that all cells of one number of ranks take"
    )
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.experts, args.k, args.rounds = [2, 4], [8], [1, 3], 2
        args.tokens, args.hidden, args.ffn = 64, 32, 16
    cells = [Cell(num_experts=e, k=k, routing=r) for e, r, k in itertools.product(args.experts, args.routing, args.k)]
    for size, num_experts in itertools.product(args.ranks, args.experts):
        if num_experts % size:
            sys.exit(f"{num_experts} experts cannot be shared out evenly among {size} ranks. Use a multiple.")
    torch.set_num_threads(1)
    machine, found = side_by_side.machine(torch.device("cpu"), ("torch",)), []
    for size in args.ranks:
        began = time.perf_counter()
        found += side_by_side.run_ranks(measure, size, cells, args, timeout_s=args.timeout)[0]
        print(f"{size} ranks: {time.perf_counter() - began:.0f} s", flush=True)
    results = {"settings": side_by_side.settings(args), "machine": machine, "cells": found}
    paths = side_by_side.write_page(args.output, "dispatch", "Bytes and time between ranks", results, lines(found))
    for path in (*paths, *draw(found, args.output)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
