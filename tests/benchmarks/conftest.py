"""Benchmarks that run in the tests' own process leave its process group and environment as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator

import deepspeed.comm.comm as deepspeed_comm
import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        deepspeed_comm.cdb = None
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
