"""What an error of torch.distributed says about another rank, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch.distributed as dist

from dynmoe_ds.distributed.groups import group_timeout

# gloo, the store and NCCL, in torch 2.13: they have no exception types of their own for these.
_TIMED_OUT = re.compile(r"Timed out waiting (\d+)ms|Timeout\(ms\)=(\d+)|timeout after (\d+)ms")
_GONE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|got 0 bytes|"
    r"remote process exited"
)
# gloo's, in an operation beside the one that has timed out, of whose time it says nothing.
_CLOSED_BY_A_TIMEOUT = "Application timeout caused pair closure"
_ADDRESS = re.compile(r"\[([\w.:%]+)\]:\d+")


def describe_lost_rank(error: BaseException) -> str | None:
    """A sentence for an error that comes of another rank's being gone or hanging; None for any other error.

    The number of that rank is not known: neither gloo nor NCCL gives it.
    """
    texts = [f"{one}" for one in _chain(error) if _is_of_distributed(one)]
    for text in texts:
        if match := _TIMED_OUT.search(text):
            return _did_not_take_part(int(next(filter(None, match.groups()))) / 1000)
    for text in texts:
        if _GONE.search(text):
            address = _ADDRESS.search(text)
            where = f" ({address.group(1)})" if address else ""
            return f"Another rank{where} has gone: its connection was closed."
    if any(_CLOSED_BY_A_TIMEOUT in text for text in texts):
        return _did_not_take_part(group_timeout().total_seconds() if dist.is_initialized() else None)
    if texts:
        return "Another rank has gone or hangs: it cannot be reached."
    return None


def _did_not_take_part(seconds: float | None) -> str:
    within = "in time" if seconds is None else f"within {seconds:g} s"
    return f"Another rank did not take part {within}: it hangs, or its host does not answer."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_distributed(error: BaseException) -> bool:
    """gloo raises RuntimeError, with the path of its source or its name in most texts."""
    text = f"{error}"
    is_of_gloo = "gloo" in text.lower() or _CLOSED_BY_A_TIMEOUT in text
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and is_of_gloo)
