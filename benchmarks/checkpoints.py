"""What does a checkpoint cost, what does writing it in the background hide, and what does a resize cost and save?

    python -m benchmarks.checkpoints --output docs/results/checkpoints.json

Two ranks of one machine with expert parallelism, ZeRO-1 and AdamW. Every round does everything once, in the same order,
and writes the same number of bytes to a plain file beside it; minima and maxima over rounds, since machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WORLD_SIZE = 2
NUM_EXPERTS, NUM_SLOTS, MANY_SLOTS = 8, 8, 16


class Model(nn.Module):
    """Residual `MoELayer`s between two linear layers; the mean squared error of its tokens."""

    def __init__(self, args: argparse.Namespace, num_experts: int, num_slots: int) -> None:
        import dynmoe_ds as dm

        super().__init__()
        width = args.hidden_size
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.moe = nn.ModuleList(
            dm.MoELayer(
                hidden_size=width, ffn_hidden_size=args.ffn_hidden_size, num_experts=num_experts, num_slots=num_slots,
                ep_size=WORLD_SIZE, router="top_k", seed=index,
            )
            for index in range(args.layers)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.moe:
            h = h + layer(h)
        return self.last(h).square().mean()


def measure(rank: int, port: int, args: argparse.Namespace, folder: str, results: Any) -> None:
    """One rank. Puts the rounds into `results` on rank 0."""
    os.environ.update(
        RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{WORLD_SIZE}", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=f"{port}", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    x = torch.randn(args.tokens, args.hidden_size, generator=torch.Generator().manual_seed(rank))
    rounds = time_rounds(args, Path(folder), x)
    memory = [line for stage in range(4) for line in memory_of_pools(args, stage, x)]
    if rank == 0:
        results.extend([*rounds, memory])
    dist.destroy_process_group()


def time_rounds(args: argparse.Namespace, folder: Path, x: Tensor) -> list[dict[str, float]]:
    """All rounds, one after another."""
    engine = build(args, 1, NUM_EXPERTS, NUM_SLOTS)

    def step() -> None:
        engine.backward(engine(x))
        engine.step()

    step()
    found = []
    for number in range(args.rounds):
        found.append(one_round(engine, step, folder / f"{number}"))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / f"{number}")
        dist.barrier()
    return found


def build(args: argparse.Namespace, stage: int, num_experts: int, num_slots: int) -> Any:
    """An engine with AdamW in float32."""
    import dynmoe_ds as dm

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "steps_per_print": 10**9,
    }
    return dm.initialize(Model(args, num_experts, num_slots), config)


def memory_of_pools(args: argparse.Namespace, stage: int, x: Tensor) -> list[dict[str, Any]]:
    """Bytes of this rank's experts between backward and step, with 4 experts in 16 slots and after a resize to 4."""
    engine, found = build(args, stage, 4, 16), []
    for num_slots in (16, 4):
        engine.resize_slots(num_slots)
        engine.backward(engine(x))
        engine.step()  # moments are there from the first step on
        engine.backward(engine(x))
        found.append({"stage": stage, "num_slots": num_slots, **engine.expert_memory()})
        engine.step()
    return found


def one_round(engine: Any, step: Callable[[], None], place: Path) -> dict[str, float]:
    """Seconds by name, and the gigabytes that a checkpoint takes."""
    now, background = place / "now", place / "background"
    found = {"step": min(timed(step) for _ in range(5))}
    found["save"] = timed(lambda: engine.save_checkpoint(now))
    num_bytes = sum(file.stat().st_size for file in now.rglob("*") if file.is_file())
    found["plain file"] = timed(lambda: write_plain(place / "plain", num_bytes) if dist.get_rank() == 0 else None)
    found["load"] = timed(lambda: engine.load_checkpoint(now))
    found["save in the background: the call"] = timed(lambda: engine.save_checkpoint(background, asynchronous=True))
    seconds, count = steps_until(step, background / "latest")
    engine.wait_for_checkpoint()
    found["save in the background: until it is there"] = seconds
    found["step beside it"] = seconds / count
    found["resize to twice the slots"] = timed(lambda: engine.resize_slots(MANY_SLOTS))
    step()
    found["resize back"] = timed(lambda: engine.resize_slots(NUM_SLOTS))
    step()
    return found | {"gigabytes": num_bytes / 1e9}


def timed(action: Callable[[], object]) -> float:
    """Seconds until all ranks are through."""
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def steps_until(step: Callable[[], None], there: Path) -> tuple[float, int]:
    """Train until a file is there: seconds, and the steps taken."""
    count, done, began = 0, torch.zeros(()), time.perf_counter()
    while not done:
        step()
        count += 1
        done = torch.tensor(float(there.exists()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
    return time.perf_counter() - began, count


def write_plain(path: Path, num_bytes: int) -> None:
    """The same number of bytes, one after another, seen to the disk."""
    block = os.urandom(2**24)
    with path.open("wb") as file:
        for _ in range(num_bytes // len(block) + 1):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| what | least, s | most, s | least, ms per GB |", "| --- | --- | --- | --- |"]
    gigabytes = found["rounds"][0]["gigabytes"]
    for name in found["rounds"][0]:
        if name != "gigabytes":
            values = [one[name] for one in found["rounds"]]
            per_gb = "" if name.startswith("step") else f"{1000 * min(values) / gigabytes:.0f}"
            lines.append(f"| {name} | {min(values):.2f} | {max(values):.2f} | {per_gb} |")
    lines += ["", "| ZeRO | slots | weights, MB | gradients, MB | masters, MB | moments, MB |"]
    lines += ["| --- " * 6 + "|"]
    for line in found["memory"]:
        sizes = [f"{line[kind] / 1e6:.2f}" for kind in ("weights", "gradients", "masters", "moments")]
        lines.append(f"| {line['stage']} | {line['num_slots']} | {' | '.join(sizes)} |")
    return "\n".join([f"{gigabytes:.3f} GB of state.", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--ffn-hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a rank in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/checkpoint-cost"), help="on the disk to measure")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.list()
        ranks = [
            context.Process(target=measure, args=(rank, port, args, f"{args.folder}", results), daemon=True)
            for rank in range(WORLD_SIZE)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("A rank failed.")
        *rounds, memory = results
    found = {
        "settings": {key: value for key, value in vars(args).items() if key not in ("output", "folder")},
        "machine": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
        "rounds": rounds,
        "memory": memory,
    }
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
