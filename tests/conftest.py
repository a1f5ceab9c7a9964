"""For all tests."""

import gc
import os
import signal

# Tests compare runs bit for bit. On some CPUs MKL rounds by where in memory a matrix begins, unless it is told not to;
# it reads this at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch

# Shells start background jobs with SIGINT ignored, nohup ignores SIGHUP, and children inherit that: tests of both would
# wait in vain.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Models of tests are so small that threads only wait for one another, most of all on a machine that has other work.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, those of the launcher, or one worker would be left alone with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("launcher") is None)


def pytest_collection_finish() -> None:
    """Every full collection of garbage would search all that is imported by now, again and again: 0.4 s each time."""
    gc.collect()
    gc.freeze()
