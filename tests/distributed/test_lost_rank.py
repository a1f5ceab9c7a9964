"""Errors of torch.distributed in words: which of them mean that another rank is gone or hangs."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from dynmoe_ds.distributed import describe_lost_rank
from dynmoe_ds.errors import CheckpointError

CLOSED = "[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.88.0.2]:62675. GLHF!"
TIMED_OUT = "[/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"
WATCHDOG = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, Timeout(ms)=600000) ran"
CLOSURE = "Application timeout caused pair closure"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(CLOSED), "Another rank (10.88.0.2) has gone: its connection was closed."),
        (RuntimeError(TIMED_OUT), "Another rank did not take part within 5 s: it hangs, or its host does not answer."),
        (RuntimeError(CLOSURE), "Another rank did not take part in time: it hangs, or its host does not answer."),
        (dist.DistBackendError("NCCL error"), "Another rank has gone or hangs: it cannot be reached."),
        (dist.DistBackendError(WATCHDOG), "Another rank did not take part within 600 s: it hangs,"),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), "Another rank has gone: its connection was closed."),
    ],
)
def test_what_is_said(error: Exception, said: str) -> None:
    assert f"{describe_lost_rank(error)}".startswith(said)


def test_an_operation_beside_the_one_that_timed_out_tells_how_long_ranks_wait() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=7))
    try:
        assert f"{describe_lost_rank(RuntimeError(CLOSURE))}".startswith("Another rank did not take part within 7 s:")
    finally:
        dist.destroy_process_group()


def test_the_first_error_of_a_chain_says_most() -> None:
    first = CheckpointError("The checkpoint cannot be written.")
    first.__cause__ = RuntimeError(TIMED_OUT)
    last = RuntimeError(CLOSURE)
    last.__cause__ = first
    assert "within 5 s" in f"{describe_lost_rank(last)}"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory"), ConnectionResetError("Connection reset by peer"), ValueError(TIMED_OUT)],
)
def test_other_errors_are_not_about_ranks(error: Exception) -> None:
    assert describe_lost_rank(error) is None
