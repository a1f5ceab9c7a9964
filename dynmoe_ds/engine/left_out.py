"""Leaving out an update that has been computed, on stock DeepSpeed 0.19.8.

Every DeepSpeed optimiser has a branch for gradients that overflow, which drops them and counts the step. What follows
does the same for any reason, at every ZeRO stage; tests/engine/test_non_finite.py compares bit for bit per stage with a
run that never saw the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

MAX_GRADIENT_NORM = torch.finfo(torch.float32).max ** 0.5
"""The square of a larger one is infinite in float32."""


def drop_gradients(deepspeed_engine: Any) -> None:
    """Forget all gradients since the last update, also those that ZeRO keeps; weights and moments stay as they are.

    What ZeRO keeps would be overwritten by the next backward pass, but take memory until then.
    """
    optimizer, stage = deepspeed_engine.optimizer, deepspeed_engine.zero_optimization_stage()
    if stage == 3:
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)
    elif stage > 0 and hasattr(optimizer, "averaged_gradients"):
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
    else:  # torch's own, FP16_UnfusedOptimizer and BF16_Optimizer, whose `zero_grad` drops everything
        optimizer.zero_grad()
    if hasattr(deepspeed_engine, "_unmanaged_backward_count"):
        deepspeed_engine._unmanaged_backward_count = 0


def leave_out_update(deepspeed_engine: Any) -> None:
    """DeepSpeed's `step` without the update: gradients are dropped, and the step counts as one that was skipped.

    As in every skipped step of DeepSpeed a learning-rate scheduler stays where it is.
    """
    with _forced_overflow(deepspeed_engine):
        deepspeed_engine.step()


def watch_gradient_norm(optimizer: Any) -> None:
    """Make ZeRO leave out an update whose gradients are too large to be squared in float32, at every stage and dtype.

    Adam squares them. Of itself DeepSpeed leaves out the update at ZeRO-1 and 2 in float32. At ZeRO-3 it has the norm
    in float64, which is finite. In bfloat16 it asks only if `bf16.check_grad_overflow` is set, for three more passes
    over all gradients; else it divides by an infinite norm and destroys the masters.
    """
    for name in ("scaled_global_norm", "_get_norm_groups"):  # of ZeRO-1 and 2, of ZeRO-3
        ordinary = getattr(optimizer, name, None)
        if ordinary is not None and name not in vars(optimizer):
            setattr(optimizer, name, partial(_watched_norm, optimizer, ordinary))


def _watched_norm(optimizer: Any, ordinary: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `ordinary` gives, a norm or those of groups, equal on all ranks."""
    norms = ordinary(*args, **kwargs)
    norm = float(combine_grad_norm_groups(norms if isinstance(norms, list) else [norms]))  # infinite for invalid ones
    if norm > MAX_GRADIENT_NORM:
        optimizer.overflow = True
    return norms


@contextmanager
def _forced_overflow(deepspeed_engine: Any) -> Iterator[None]:
    """Within it the optimiser's `step` does what it does after an overflow."""
    optimizer = deepspeed_engine.optimizer
    had_step, had_overflow = "step" in vars(optimizer), hasattr(optimizer, "overflow")
    ordinary = optimizer.step
    # Of the instance: torch's schedulers put a step of their own there.
    optimizer.step = lambda *args, **kwargs: drop_gradients(deepspeed_engine)
    optimizer.overflow = True
    try:
        yield
    finally:
        if had_step:
            optimizer.step = ordinary
        else:
            del optimizer.step
        if not had_overflow:  # torch's own, which DeepSpeed must not find overflowing from now on
            del optimizer.overflow
