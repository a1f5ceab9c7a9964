"""Page faults of repeated large allocations, counted by the kernel in a process of their own."""

import os
import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch
from dynmoe_ds.experts.host_memory import keep_large_blocks
did = keep_large_blocks() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The heap settles within a few steps: an aligned block may not fit into the first hole of its own size.
print(did, min(faults() for _ in range(8)))
"""


def probe(how: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", PROBE, how],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    did, faults = result.stdout.split()
    return did, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc settings of glibc")
def test_a_large_block_is_reused_without_page_faults():
    assert probe("leave")[1] > 100
    did, faults = probe("keep")
    assert did == "True" and faults < 10


def test_the_users_own_settings_are_left_alone():
    assert probe("keep", MALLOC_ARENA_MAX="2")[0] == "False"
    assert probe("keep", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] == "False"
