"""When experts are added and removed, and what a new one starts from."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from dynmoe_ds.errors import ConfigError

Seeding = Literal["copy_nearest", "copy_most_loaded", "mean", "fresh"]
SEEDINGS: tuple[str, ...] = ("copy_nearest", "copy_most_loaded", "mean", "fresh")
NEW_THRESHOLDS: tuple[str, ...] = ("zero", "mean_of_live")
POOLS: tuple[str, ...] = ("fixed", "elastic")


@dataclass(frozen=True, slots=True)
class AdaptationConfig:
    """Every `every_steps` optimiser steps an adaptation on the records of the last `window_steps` steps.

    The defaults are Algorithm 1 of DynMoE: prune what nobody chose in the window, add one expert if any token chose
    nobody, with gate row R_S / |R_S| and threshold 0. The paper leaves the feed-forward weights of the new expert open.

    every_steps: optimiser steps between adaptations. window_steps: how many of the last of them are recorded.
    rule: a registered rule. seeding: what the new expert's weights and moments start from. noise: standard deviation
    of the noise on copied weights, as a fraction of the standard deviation of the copied tensor.
    min_unrouted_share: share of the window's tokens that must have chosen nobody before an expert is added; 0 means
    "any token", as in the paper. prune_below_share: prune experts whose load is below this fraction of the mean load
    of the live experts; 0 means "chosen by nobody", as in the paper. new_threshold: threshold of a new expert.
    last_growth_step: no expert is added after this step; None sets no end. first_step: the step that the first
    adaptation follows; None is `every_steps`. With steps of an epoch, 1/3 of them as window and 2/3 as first step make
    the paper's "record from 1/3 to 2/3 of each epoch, then adapt".

    pool: `fixed` keeps every layer's number of slots. `elastic` resizes a layer's pool at an adaptation, as
    `engine.resize_slots` does: it grows when an expert is wanted and no slot is free, to at most `max_slots`, and
    shrinks when half of its slots would do; one slot in four is free afterwards.

    Of a split: split_separation: how far the gate rows of the two halves part, the E of `w ± E |w| u`.
    split_reset_share: share of the child's hidden units that start anew instead of as the parent's, which helped in the
    first fifth of training and hurt later. split_above_load: the rule `split_loaded` splits experts with more than this
    times the mean load. `seeding`, `noise` and `new_threshold` are for experts that are added, not split.

    Of rebalancing: rebalance_above: experts change ranks when the busiest rank of an expert-parallel group has more
    than this times the mean load (tokens of its experts in the window); None never moves one. rebalance_cost: what
    carrying one expert over costs, as a share of a rank's mean load; a step must relieve the busier of its two ranks by
    more, and an exchange, which carries two, by more than twice as much. It is the seconds that carrying one over takes
    (weights, master and moments of an expert, through every rank of its group) divided by those that a rank of mean
    load computes this layer's experts until the next adaptation (`every_steps` times those of one step).

    Source: arXiv 2405.14297 §3.2; the fields from `noise` to `split_above_load` come from the studies summed up in
    docs/decisions.md, which also says how rebalancing was measured.
    """

    every_steps: int
    window_steps: int
    rule: str = "paper"
    seeding: Seeding = "copy_nearest"
    noise: float = 0.1
    min_unrouted_share: float = 0.0
    prune_below_share: float = 0.0
    new_threshold: Literal["zero", "mean_of_live"] = "zero"
    last_growth_step: int | None = None
    first_step: int | None = None
    split_separation: float = 1.0
    split_reset_share: float = 0.0
    split_above_load: float = 1.5
    pool: Literal["fixed", "elastic"] = "fixed"
    max_slots: int | None = None
    rebalance_above: float | None = None
    rebalance_cost: float = 0.02

    def __post_init__(self) -> None:
        faults = self.faults()
        if faults:
            raise ConfigError(faults)

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        found = []
        if self.every_steps < 1:
            found.append(f"adaptation.every_steps is {self.every_steps} but must be at least 1.")
        if not 1 <= self.window_steps <= max(self.every_steps, 1):
            found.append(
                f"adaptation.window_steps is {self.window_steps} but must be between 1 and "
                f"adaptation.every_steps ({self.every_steps}): windows do not overlap."
            )
        if self.seeding not in SEEDINGS:
            found.append(f"adaptation.seeding is {self.seeding!r}. Use one of {', '.join(SEEDINGS)}.")
        if self.new_threshold not in NEW_THRESHOLDS:
            found.append(f"adaptation.new_threshold is {self.new_threshold!r}. Use one of {', '.join(NEW_THRESHOLDS)}.")
        if not self.noise >= 0:
            found.append(f"adaptation.noise is {self.noise} but must not be negative.")
        for name in ("min_unrouted_share", "prune_below_share"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                found.append(f"adaptation.{name} is {value} but must be at least 0 and below 1.")
        if self.last_growth_step is not None and self.last_growth_step < 0:
            found.append(f"adaptation.last_growth_step is {self.last_growth_step} but must not be negative.")
        if self.first_step is not None and self.first_step < self.window_steps:
            found.append(
                f"adaptation.first_step is {self.first_step} but must be at least adaptation.window_steps "
                f"({self.window_steps}), which are the steps before it."
            )
        if not 0 <= self.split_separation < inf:
            found.append(f"adaptation.split_separation is {self.split_separation} but must be finite, at least 0.")
        if not 0 <= self.split_reset_share <= 1:
            found.append(f"adaptation.split_reset_share is {self.split_reset_share} but must be between 0 and 1.")
        if not self.split_above_load > 0:
            found.append(f"adaptation.split_above_load is {self.split_above_load} but must be above 0.")
        if self.pool not in POOLS:
            found.append(f"adaptation.pool is {self.pool!r}. Use one of {', '.join(POOLS)}.")
        if self.max_slots is not None and self.pool != "elastic":
            found.append(f"adaptation.max_slots is {self.max_slots}, but adaptation.pool is {self.pool}: use elastic.")
        if self.max_slots is not None and self.max_slots < 1:
            found.append(f"adaptation.max_slots is {self.max_slots} but must be at least 1.")
        if self.rebalance_above is not None and not 1 <= self.rebalance_above < inf:
            found.append(
                f"adaptation.rebalance_above is {self.rebalance_above} but must be finite, at least 1 (equal loads), "
                "or null for no moves."
            )
        if not 0 <= self.rebalance_cost < inf:
            found.append(f"adaptation.rebalance_cost is {self.rebalance_cost} but must be finite, at least 0.")
        return found
