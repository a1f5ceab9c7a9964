"""Time and memory of real training steps on gloo ranks of this machine."""

from __future__ import annotations

import gc
import logging
import multiprocessing as mp
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

import dynmoe_ds as dm
from benchmarks.scale.design import Case
from dynmoe_ds.config.deepspeed_json import to_deepspeed
from dynmoe_ds.models import build_decoder, parameter_groups

BUCKET_ELEMENTS = 2**20  # DeepSpeed's default would reserve 2 GB, and hide everything else
MARK = "measured step"

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["benchmarks.scale.measure"])


class RanksFailed(RuntimeError):
    """Ranks raised, died or did not finish in time."""


@dataclass(kw_only=True, slots=True)
class Measured:
    """Of one case.

    times: seconds of every step, of the slowest rank. peak_bytes: live tensor bytes of the fullest rank at the fullest
    moment of a step. sent_bytes: by dispatch per optimiser step, mean over ranks, rows and all. mean_k: experts per
    token, mean over layers and steps.
    """

    times: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    sent_bytes: float = 0.0
    mean_k: float = 0.0


def measure_pass(
    cases: Sequence[Case], num_ranks: int, rounds: int, *, memory: bool, timeout_s: float
) -> list[Measured]:
    """All cases of as many ranks, in `rounds` rounds of one step each, interleaved. memory: whether that is measured.

    Raises: RanksFailed, with no process left behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank,
                args=(rank, num_ranks, f"{folder}/store", sender, list(cases), rounds, memory),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            by_rank = _collect(pipes, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=2)
                process.kill()
                process.join()
    return [
        Measured(
            times=[max(times) for times in zip(*(found.times for found in ranks), strict=True)],
            peak_bytes=max(found.peak_bytes for found in ranks),
            sent_bytes=sum(found.sent_bytes for found in ranks) / num_ranks,
            mean_k=ranks[0].mean_k,
        )
        for ranks in zip(*by_rank, strict=True)
    ]


def _collect(pipes: list[Connection], timeout_s: float) -> list[list[Measured]]:
    deadline, results = time.monotonic() + timeout_s, {}
    pending = dict(enumerate(pipes))
    while pending:
        ready = wait(list(pending.values()), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RanksFailed(f"ranks {sorted(pending)} did not finish within {timeout_s:.0f} s")
        for rank in [r for r, pipe in pending.items() if pipe in ready]:
            try:
                error, results[rank] = pending.pop(rank).recv()
            except EOFError:
                raise RanksFailed(f"rank {rank} died") from None
            if error:
                raise RanksFailed(f"rank {rank} failed:\n{error}")
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, num_ranks: int, store: str, sender: Connection, cases: list[Case], rounds: int, memory: bool
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120)
        )
        sender.send((None, _all_cases(cases, rounds, memory)))
    except BaseException:
        sender.send((traceback.format_exc(), []))
    sender.close()
    os._exit(0)  # gloo's destructors may wait for ranks that have failed


def _all_cases(cases: list[Case], rounds: int, memory: bool) -> list[Measured]:
    results = [Measured() for _ in cases]
    steps = []
    for case, result in zip(cases, results, strict=True):
        if memory:
            result.peak_bytes = _peak_bytes(case)
        step = _Step(case)
        step()
        step.engine.take_traffic()
        step()
        result.sent_bytes = step.sent_bytes()
        step.engine.take_records()
        steps.append(step)
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for step, result in zip(steps, results, strict=True):
            dist.barrier()
            start = time.perf_counter()
            step()
            result.times.append(time.perf_counter() - start)
    for step, result in zip(steps, results, strict=True):
        by_layer = [record.mean_k for record in step.engine.take_records().values()]
        result.mean_k = sum(by_layer) / len(by_layer)
    return results


class _Step:
    """An engine and a batch; a call is one optimiser step."""

    def __init__(self, case: Case) -> None:
        config = case.config()
        settings: dict[str, Any] = to_deepspeed(config)
        settings["zero_optimization"]["reduce_bucket_size"] = BUCKET_ELEMENTS
        model = build_decoder(config, case.vocab, eos_token_id=0)
        self.engine = dm.initialize(
            model,
            settings,
            model_parameters=parameter_groups(model, config.optim.weight_decay),
            dispatch=config.parallel.dispatch,
        )
        self.accumulation = case.accumulation
        # Of this rank alone, so that loads are as even as chance makes them.
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.ids = torch.randint(case.vocab, (case.batch, case.length), generator=generator)

    def __call__(self) -> None:
        for _ in range(self.accumulation):
            loss = self.engine(input_ids=self.ids, labels=self.ids).loss
            self.engine.backward(loss)
            self.engine.step()

    def sent_bytes(self) -> float:
        """Since the last call, by dispatch."""
        traffic = self.engine.take_traffic().values()
        return sum(layer.sent.row_bytes + layer.sent.metadata_bytes for layer in traffic)


def _peak_bytes(case: Case) -> int:
    """Live tensor bytes at the fullest moment of a step: of everything that was allocated since before the model."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = _Step(case)
        step()
        gc.collect()
        with record_function(MARK):
            step()
    events = recorded.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == MARK)
    live = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, live)
    step.engine.destroy()
    del step, recorded, events
    gc.collect()
    return peak
