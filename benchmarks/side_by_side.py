"""What comparisons share: candidates that take turns, memory at its peak, ranks on one machine, pages of results.

Machines are noisy: minima are compared, since noise only adds time, and the median and the greatest time are kept
beside them. All candidates run in every round, each round beginning with another one, so that what disturbs the machine
for a while disturbs all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

# torch's profiler writes two lines to the terminal at every use unless this is set before torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
import torch.distributed as dist

Times = dict[str, "Spread"]
"""Times of one candidate by what was timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Seconds over rounds."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(least=min(values), median=statistics.median(values), most=max(values))


def take_turns(candidates: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, Times]:
    """Times by candidate. Each gives its seconds by what it timed; a first round, which warms up, is not counted."""
    names = list(candidates)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for number in range(rounds + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            for what, seconds in candidates[name]().items():
                if number > 0:
                    found[name].setdefault(what, []).append(seconds)
    return {name: {what: Spread.of(values) for what, values in times.items()} for name, times in found.items()}


class Stopwatch:
    """Marks moments of a device: by events in the stream of a GPU, by the clock on a CPU. Made, it has its first mark.

    The path for GPUs has not run on any yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []
        if self._is_cuda:
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From the first mark to each of the others."""
        first, *others = self._marks
        if self._is_cuda:
            others[-1].synchronize()
            return [first.elapsed_time(other) / 1000 for other in others]
        return [other - first for other in others]


class AllocatedBytes:
    """Counts what tensors take inside its `with` block: `peak`, and `held` at its end, in bytes above those before it.

    On a CPU every allocation and release of torch's allocator, as torch.profiler reports them. Temporaries inside an
    operation are among them, which a TorchDispatchMode would not see; workspaces that a BLAS library takes from malloc
    by itself are not. On a GPU torch.cuda.max_memory_allocated, which has not run on any yet.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._profile = (
            None
            if device.type == "cuda"
            else torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        )
        self.peak = self.held = 0

    def __enter__(self) -> AllocatedBytes:
        if self._profile is None:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
            self.held = torch.cuda.memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(kind, error, trace)
        assert self._profile.profiler is not None
        events = list(_allocations(self._profile.profiler.kineto_results.experimental_event_tree()))
        # Releases of what was allocated before are reported too, some with the size of what was at their place then.
        blocks: dict[int, int] = {}
        for event in sorted(events, key=lambda event: event.start_time_ns):
            block = event.typed[1]
            if block.alloc_size > 0:
                blocks[block.ptr] = block.alloc_size
                self.held += block.alloc_size
            else:
                self.held -= blocks.pop(block.ptr, 0)
            self.peak = max(self.peak, self.held)


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    """The profiler's events of allocations and releases, out of a tree of all events."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def parser(name: str, doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """A command line with what all comparisons have: --rounds, --output, --quick. `doc` is the module's docstring."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help=f"all candidates run in each (default {rounds})")
    made.add_argument("--output", type=Path, default=Path("docs/results"), help=f"folder of {name}.json, .md and .png")
    made.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs (seconds)")
    return made


def machine(device: torch.device, packages: Iterable[str] = ("torch", "deepspeed", "transformers")) -> dict[str, Any]:
    """What the times were measured on."""
    found = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    found["load before"] = round(os.getloadavg()[0], 1)
    found["python"] = platform.python_version()
    return found | {name: version(name) for name in packages}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The command line as JSON can hold it, without the place of the results."""
    return {key: value for key, value in vars(args).items() if key != "output"}


def plain(times: Mapping[str, Times]) -> dict[str, dict[str, dict[str, float]]]:
    """Times as JSON can hold them."""
    return {name: {what: asdict(spread) for what, spread in of.items()} for name, of in times.items()}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        f"| {' | '.join(header)} |",
        "| " + " | ".join("---" for _ in header) + " |",
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows),
    ]


_BEGIN, _END = "<!-- tables: begin -->", "<!-- tables: end -->"


def write_page(folder: Path, name: str, title: str, found: Mapping[str, Any], lines: Iterable[str]) -> list[Path]:
    """Write `found` as JSON and `lines` as Markdown; give the paths.

    The page between its two marks is replaced, and what a person wrote around them is kept. A page without marks is
    replaced as a whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    data.write_text(json.dumps(found, indent=1) + "\n")
    told = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    asked = ", ".join(f"{key} {value}" for key, value in found["settings"].items() if value is not None)
    head = [f"`python -m benchmarks.{name}` with {asked}.", "", f"Machine: {told}.", ""]
    before, after = f"# {title}\n\n", "\n"
    if page.exists() and _BEGIN in (text := page.read_text()):
        before, rest = text.split(_BEGIN, 1)
        after = rest.split(_END, 1)[1]
    body = "\n".join([*head, *lines])
    page.write_text(f"{before}{_BEGIN}\n{body}\n{_END}{after}")
    return [data, page]


class RankFailed(RuntimeError):
    """A rank raised, died or did not finish in time."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float, num_threads: int = 1
) -> list[Any]:
    """`function(*args)` on gloo ranks of this machine, each a process with `num_threads` threads; results by rank.

    function: at the top level of a module; its result must be plain data. No process is left behind in any case.
    Raises: RankFailed with the traceback of the first rank that fails, or after `timeout_s`.
    """
    context = mp.get_context("spawn")
    # A file, since a port that is free now may not be when the ranks have started.
    store = tempfile.TemporaryDirectory()
    pipes, ranks = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank,
            args=(function, rank, world_size, store.name, num_threads, timeout_s, sender, args),
            daemon=True,
        )
        # Both are read before any code of ours runs there: by OpenMP, and by DeepSpeed when `function` is imported.
        with _environment(OMP_NUM_THREADS=f"{num_threads}", DS_ACCELERATOR="cpu"):
            process.start()
        sender.close()
        pipes.append(receiver)
        ranks.append(process)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(results) < world_size:
            pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(pending, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                late = [rank for rank in range(world_size) if rank not in results]
                raise RankFailed(f"Ranks {late} of {world_size} did not finish within {timeout_s} s.")
            for pipe in ready:
                rank = next(rank for rank, other in enumerate(pipes) if other is pipe)
                try:
                    is_well, results[rank] = pipe.recv()
                except EOFError:
                    raise RankFailed(f"Rank {rank} of {world_size} died.") from None
                if not is_well:
                    raise RankFailed(f"Rank {rank} of {world_size} failed:\n{results[rank]}")
    finally:
        for process in ranks:
            process.join(timeout=2)
            process.kill()
            process.join()
        store.cleanup()
    return [results[rank] for rank in range(world_size)]


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    num_threads: int,
    timeout_s: float,
    sender: Any,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world_size}", MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    torch.set_num_threads(num_threads)
    try:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}/ranks", rank=rank, world_size=world_size, timeout=timeout
        )
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    sender.close()
    os._exit(0)  # gloo's destructors may wait for ranks that have failed


class _environment:
    """Environment variables for the length of a `with` block."""

    def __init__(self, **values: str) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._values}
        os.environ.update(self._values)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
