"""Making sure that all ranks hold the same thing, with an error on all of them if they do not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from dynmoe_ds.errors import DivergenceError

T = TypeVar("T")


def assert_same_on_all_ranks(
    what: str,
    values: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
    *,
    advice: str = "Start all ranks alike.",
) -> None:
    """Compare `values` (anything that JSON can hold) over the ranks of `group`; `advice` ends the error's message.

    Collective: every rank of `group`; without torch.distributed it does nothing. Raises: DivergenceError on every rank
    that names each differing key with the values and the ranks that hold them.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    own = {key: json.dumps(value, sort_keys=True, default=str) for key, value in values.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    if differences := _differences(everyone):
        raise DivergenceError(f"The ranks disagree on {what}. " + " ".join(differences) + " " + advice)


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank if any rank has an error, so that nobody waits for a rank that has stopped.

    Collective: every rank of `group`. Raises: this rank's own error, else a DivergenceError that quotes the others'. If
    another rank cannot be reached, torch's error about that, with this rank's own, which may say why, as its cause.
    """
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        everyone: list[Any] = [None] * dist.get_world_size(group)
        own = None if error is None else f"{type(error).__name__}: {error}"
        try:
            dist.all_gather_object(everyone, own, group=group)
        except Exception as lost:
            raise lost from error
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text is not None]
    else:
        failures = []
    if error is not None:
        raise error
    if failures:
        raise DivergenceError("Another rank failed, so this one stops too. " + "; ".join(failures))


def attempt_together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `action` gives here, unless it fails anywhere. It must not contain a collective of its own.

    Collective: every rank of `group`. Raises: as `raise_together`.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as e:  # whatever it is, the other ranks must not wait for this one
        error = e
    raise_together(error, group)
    return result  # type: ignore[return-value]


def take_from_first_rank(tensor: Tensor) -> None:
    """Overwrite `tensor` by rank 0's, for values that all ranks compute alike but for their hardware's last bit.

    Collective: every rank, with tensors of one shape and dtype; without torch.distributed it does nothing.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tensor, src=0)


def _differences(everyone: list[dict[str, str]]) -> list[str]:
    keys = sorted(set().union(*everyone))
    found = []
    for key in keys:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, values in enumerate(everyone):
            ranks_by_value.setdefault(values.get(key, "absent"), []).append(rank)
        if len(ranks_by_value) > 1:
            held = ", ".join(f"{_short(v)} on rank {', '.join(map(str, r))}" for v, r in ranks_by_value.items())
            found.append(f"{key} is {held}.")
    return found


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
