"""Runs a function on several gloo ranks, each a process, with a hard time limit."""

from __future__ import annotations

import gc
import io
import logging
import multiprocessing as mp
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

# Before the fork server imports DeepSpeed, which then keeps the accelerator that it finds.
os.environ["DS_ACCELERATOR"] = "cpu"

_CONTEXT = mp.get_context("forkserver")
# Ranks fork from a server that has imported the slow packages once, so a rank starts in milliseconds. DeepSpeed's are
# what it imports when an engine is made: with them torch's compiler, 2 s of every rank. A training and the pictures of
# its report would be 0.3 and 0.5 s.
_PRELOADED = [
    "dynmoe_ds.export", "tests.helpers.models", "pytest", "torch.distributed.checkpoint",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "dynmoe_ds.training.run", "matplotlib.figure", "matplotlib.backends.backend_agg",
]  # fmt: skip


def _process(**of_process: Any) -> BaseProcess:
    """A process of the server. There is one in all of Python, and benchmarks name other packages when imported."""
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    return _CONTEXT.Process(**of_process, daemon=True)


class RankFailed(AssertionError):
    """A rank raised, died or did not finish in time."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """`function(rank, world_size, *args)` on gloo ranks; their results by rank.

    function: at the top level of a module. Raises: RankFailed with the traceback of the first rank that fails, or the
    list of ranks that have not finished after `timeout_s`. No process is left behind in any case.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _process(target=_run, args=(function, rank, world_size, f"{folder}/store", sender, args))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=2)
                process.kill()
                process.join()


def start_rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, *args: Any
) -> tuple[Connection, BaseProcess]:
    """Start `function(rank, world_size, *args)` on one rank, which makes the process group itself.

    What it returns comes through the pipe as (True, value), or (False, traceback). The caller kills the process.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _process(target=_run_alone, args=(function, rank, world_size, port, sender, args))
    process.start()
    sender.close()
    return receiver, process


def allow_workers() -> None:
    """Let this rank have worker processes, which multiprocessing forbids what is killed with its parent."""
    mp.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _collect(pipes: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    pending = dict(enumerate(pipes))
    while pending:
        ready = wait(list(pending.values()), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RankFailed(f"ranks {sorted(pending)} did not finish within {timeout_s} s")
        for rank in [r for r, pipe in pending.items() if pipe in ready]:
            try:
                ok, value = pending.pop(rank).recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died") from None
            if not ok:
                raise RankFailed(f"rank {rank} failed:\n{value}")
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _set_up(rank: int, world_size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    # What the server has imported is garbage for nobody. To search it costs 0.4 s each time, and its memory is copied.
    gc.freeze()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _run_alone(
    function: Callable[..., Any], rank: int, world_size: int, port: int, sender: Connection, args: tuple[Any, ...]
) -> None:
    _set_up(rank, world_size, port)
    try:
        sender.send((True, function(rank, world_size, *args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    sender.close()
    os._exit(0)


def _run(
    function: Callable[..., Any], rank: int, world_size: int, store: str, sender: Connection, args: tuple[Any, ...]
) -> None:
    _set_up(rank, world_size, port=0)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
        )
        # As bytes: multiprocessing would share tensors by file handles that die with this process.
        result = io.BytesIO()
        torch.save(function(rank, world_size, *args), result)
        sender.send((True, result.getvalue()))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    sender.close()
    os._exit(0)  # gloo's destructors may wait for ranks that have failed
