"""What do chunks, work beside the communication, and once-per-node dispatch gain where the link is slow?

    python -m benchmarks.slow_link                       # root and Debian's iproute2; minutes
    python -m benchmarks.slow_link --megabits 100 1000

Two hosts are network namespaces of this machine, and the cable between them carries so many megabits per second and
direction (tc's tbf); ranks of one host talk through its loopback device, as fast as memory. gloo sends through TCP, as
between machines, while the cores compute: one rank per host has a core of its own on two cores. The way by node is
timed with two ranks per host, which share a core; only the two ways there may be compared with each other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dynmoe_ds as dm
from benchmarks import side_by_side
from benchmarks.dispatch import Cell, build_layer, timed

ADDRESSES = ("10.89.0.1", "10.89.0.2")
PORT = 29511
LAST_WORDS_S = 2.0
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

ONE_CHUNK, AFTER, FLAT = "1 chunk", "shared expert after", "straight to each rank"
# Candidates by what they are compared with, which is the first of each.
GROUPS: dict[str, tuple[str, ...]] = {
    ONE_CHUNK: (ONE_CHUNK, "2 chunks", "4 chunks"),
    AFTER: (AFTER, "shared expert beside"),
    FLAT: (FLAT, "once per node"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a layer. tokens: of a rank."""

    tokens: int = 1024
    hidden: int = 256
    ffn: int = 1024
    num_experts: int = 16
    k: int = 2
    rounds: int = 8


class SlowLink:
    """Two network namespaces with a cable of `megabits` per second between them, for the length of a `with` block."""

    def __init__(self, megabits: int) -> None:
        self._megabits = megabits
        # Of this process: another one beside it has its own.
        self.spaces = tuple(f"slow-{name}-{os.getpid()}" for name in "ab")

    def __enter__(self) -> SlowLink:
        first, second = self.spaces
        try:
            for space in self.spaces:
                _call("ip", "netns", "add", space)
            # The same name on both, so that one GLOO_SOCKET_IFNAME fits.
            _call(*f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}".split())
            for space, address in zip(self.spaces, ADDRESSES, strict=True):
                _call(*f"ip -n {space} addr add {address}/24 dev eth0".split())
                for device in ("lo", "eth0"):
                    _call(*f"ip -n {space} link set {device} up".split())
                shape = f"tc qdisc add dev eth0 root tbf rate {self._megabits}mbit burst 128kb latency 100ms"
                _call("ip", "netns", "exec", space, *shape.split())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], env=_environment(), capture_output=True, check=False)


def why_not() -> str | None:
    """One sentence why there can be no such hosts here; None if there can."""
    if os.geteuid() != 0:
        return "Network namespaces are made as root, and this is another user."
    if missing := [name for name in ("ip", "tc") if shutil.which(name, path=_PATH) is None]:
        return f"There is no {' and no '.join(missing)}. On Debian: apt-get install iproute2."
    try:
        with SlowLink(100):
            return None
    except subprocess.CalledProcessError as error:
        return f"This machine does not let root make such hosts: {error.stderr.strip()}"


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _PATH}


def _call(*words: str) -> None:
    subprocess.run(words, env=_environment(), capture_output=True, text=True, check=True)


def run(megabits: int, ranks_per_host: int, sizes: Sizes, timeout_s: float) -> dict[str, dict[str, float]]:
    """Seconds of the slowest rank by candidate.

    Raises: RankFailed if a rank fails or does not finish in time; no process is left behind.
    """
    world = 2 * ranks_per_host
    with SlowLink(megabits) as link, tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        ranks: list[subprocess.Popen[bytes]] = []
        logs: list[Path] = []
        try:
            for rank in range(world):
                given = {
                    "RANK": f"{rank}", "WORLD_SIZE": f"{world}", "LOCAL_RANK": f"{rank % ranks_per_host}",
                    "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": f"{PORT}", "GLOO_SOCKET_IFNAME": "eth0",
                    "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                }  # fmt: skip
                what = f"on_rank({asdict(sizes)}, {timeout_s}, {str(result)!r})"
                python = [sys.executable, "-c", f"from benchmarks.slow_link import on_rank; {what}"]
                words = ["ip", "netns", "exec", link.spaces[rank // ranks_per_host], *python]
                logs.append(Path(folder) / f"{rank}.txt")
                with logs[-1].open("w") as log:
                    ranks.append(subprocess.Popen(words, env={**_environment(), **given}, stdout=log, stderr=log))
            await_ranks(ranks, logs, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        found: dict[str, dict[str, float]] = json.loads(result.read_text())
        return found


def await_ranks(ranks: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], timeout_s: float) -> None:
    """Until all have ended well. logs: what each rank prints.

    Raises: RankFailed with the words of the ranks that fail, or of all after `timeout_s`; ranks may still be running.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [rank.poll() for rank in ranks]
        # Looked at before "have all ended?": all may fail between two looks.
        if any(codes):
            time.sleep(LAST_WORDS_S)  # the rank that is seen first may have failed of another's end
            failed, what = [i for i, rank in enumerate(ranks) if rank.poll()], "failed"
        elif None in codes and time.monotonic() > deadline:
            failed, what = list(range(len(ranks))), f"did not finish within {timeout_s} s"
        elif None in codes:
            time.sleep(0.1)
            continue
        else:
            return
        raise side_by_side.RankFailed(
            "\n".join(f"Rank {i} of {len(ranks)} {what}:\n{logs[i].read_text()}" for i in failed)
        )


def on_rank(sizes: Mapping[str, int], timeout_s: float, result: str) -> None:
    """One rank of `run`, which ends the process. Raises: AssertionError if candidates that should be equal are not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    times = side_by_side.take_turns(_candidates(Sizes(**sizes)), sizes["rounds"])
    if dist.get_rank() == 0:
        seconds = side_by_side.plain(times)
        Path(result).write_text(json.dumps({name: of["forward + backward"] for name, of in seconds.items()}))
    dist.barrier()
    os._exit(0)  # gloo's destructors may end a rank that has finished with an error: a thread of theirs still runs


def _candidates(sizes: Sizes) -> dict[str, Callable[[], dict[str, float]]]:
    world = dist.get_world_size()
    cell = Cell(num_experts=sizes.num_experts, k=sizes.k, routing="uniform")
    layer, hidden, _, weights = build_layer(cell, sizes.tokens, sizes.hidden, sizes.ffn)
    torch.manual_seed(0)
    wide = nn.Linear(sizes.hidden, 2 * sizes.ffn)
    shared = nn.Sequential(wide, nn.SiLU(), nn.Linear(2 * sizes.ffn, sizes.hidden))

    def step(dispatch: dm.DispatchConfig, beside: nn.Module | None = None, after: nn.Module | None = None) -> Tensor:
        layer.dispatch, layer.shared = dispatch, beside
        y: Tensor = layer(hidden)
        return y if after is None else y + after(hidden)

    ways: dict[str, Callable[[], Tensor]] = {}
    if world == 2:
        for name, chunks in zip(GROUPS[ONE_CHUNK], (1, 2, 4), strict=True):
            ways[name] = lambda chunks=chunks: step(dm.DispatchConfig(chunks=chunks))  # type: ignore[misc]
        ways[AFTER] = lambda: step(dm.DispatchConfig(), after=shared)
        ways[GROUPS[AFTER][1]] = lambda: step(dm.DispatchConfig(), beside=shared)
    else:
        ways[FLAT] = lambda: step(dm.DispatchConfig())
        ways[GROUPS[FLAT][1]] = lambda: step(dm.DispatchConfig(ranks_per_node=world // 2))
    for names in GROUPS.values():
        outputs = [ways[name]().detach() for name in names if name in ways]
        assert all((y - outputs[0]).abs().max() <= 1e-4 * y.abs().max() for y in outputs[1:]), names

    both = nn.ModuleList([layer, shared])
    return {name: timed(way, hidden, weights, both) for name, way in ways.items()}


def lines(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table for each comparison."""
    yield (
        "Milliseconds of one layer, forward and backward, of the slowest rank: minima over rounds in which all take "
        "turns, with the greatest in brackets, and in front of it the ratio to the first column."
    )
    for first, names in GROUPS.items():
        own = [cell for cell in cells if first in cell["seconds"]]
        hosts = f"{own[0]['ranks'] // 2} rank{'s' * (own[0]['ranks'] > 2)} per host"
        yield from ("", f"## {' · '.join(names)} ({hosts})", "")
        yield from side_by_side.table(["megabits / s", "k", *names], ([*_row(cell, names)] for cell in own))


def _row(cell: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    yield f"{cell['megabits']}"
    yield f"{cell['k']}"
    base = cell["seconds"][names[0]]["least"]
    for name in names:
        of = cell["seconds"][name]
        yield f"{of['least'] / base:.2f}: {1e3 * of['least']:.0f} ({1e3 * of['most']:.0f})"


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Ratios over the link's speed; a panel for each comparison and k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    all_k = list(dict.fromkeys(cell["k"] for cell in cells))
    figure, axes = plt.subplots(
        len(all_k), len(GROUPS), figsize=(4 * len(GROUPS), 2.6 * len(all_k) + 0.6), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for row, k in enumerate(all_k):
        for axis, (first, names) in zip(axes[row], GROUPS.items(), strict=True):
            own = sorted((c for c in cells if first in c["seconds"] and c["k"] == k), key=lambda c: c["megabits"])
            for name in names:
                ratios = [c["seconds"][name]["least"] / c["seconds"][first]["least"] for c in own]
                axis.plot([c["megabits"] for c in own], ratios, "o-", label=name)
            axis.set_xscale("log")
            axis.set_xticks([c["megabits"] for c in own], [f"{c['megabits']}" for c in own])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_title(f"mean k {k}", fontsize=9)
            axis.legend(fontsize=8)
            if row == len(all_k) - 1:
                axis.set_xlabel("megabits per second between the hosts")
        axes[row][0].set_ylabel("time / that of the first")
    figure.suptitle("One layer, forward + backward, on two hosts with a slow link; lower is better", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> int:
    parser = side_by_side.parser("slow_link", __doc__ or "", rounds=8)
    parser.add_argument("--megabits", type=int, nargs="+", default=[100, 300, 1000, 10000])
    parser.add_argument("--k", type=int, nargs="+", default=[2, 6], help="mean number of experts per token")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one speed of the link takes")
    args = parser.parse_args()
    if why := why_not():
        sys.exit(why)
    if args.quick:
        args.rounds = 2
    small = {"tokens": 64, "hidden": 32, "ffn": 16, "num_experts": 8} if args.quick else {}
    machine, cells = side_by_side.machine(torch.device("cpu"), ("torch",)), []
    machine["threads"] = "1 per rank"
    for k in args.k:
        for megabits in args.megabits:
            for ranks_per_host in (1, 2):
                sizes = Sizes(**small, rounds=args.rounds, k=k)
                seconds = run(megabits, ranks_per_host, sizes, args.timeout)
                cells.append({"megabits": megabits, "ranks": 2 * ranks_per_host, "k": k, "seconds": seconds})
            print(f"k {k}, {megabits} megabits per second: done", flush=True)
    settings = {**asdict(Sizes(**small)), **side_by_side.settings(args)}
    results = {"settings": settings, "machine": machine, "cells": cells}
    paths = side_by_side.write_page(args.output, "slow_link", "Dispatch over a slow link", results, lines(cells))
    print(*paths, draw(cells, args.output / "slow_link.png"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
