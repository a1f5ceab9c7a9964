"""What is compared: a router, a pool and how it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import dynmoe_ds as dm
from dynmoe_ds.routing import RouterConfig

EXPERT_FFN = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """group: for the table. router None: a dense FFN. growth: the adaptation for a number of steps; None for none.

    resumed_from: the variant whose trained weights it starts from, for the same number of steps once more.
    is_continued: whether others start from it. grows_between: of a variant whose pool grows, the two variants of an
    equal router that keep the pool it starts with, and the pool it ends with. lr_factor: on the peak learning rate.
    """

    name: str
    group: str
    router: RouterConfig | None
    num_experts: int = 16
    num_slots: int = 16
    ffn_hidden_size: int = EXPERT_FFN
    growth: Callable[[int], dm.AdaptationConfig] | None = None
    resumed_from: str | None = None
    is_continued: bool = False
    grows_between: tuple[str, ...] = ()
    lr_factor: float = 1.0

    def adaptation(self, steps: int) -> dm.AdaptationConfig | None:
        return self.growth(steps) if self.growth else None

    def parent(self) -> Variant:
        assert self.resumed_from is not None
        return VARIANTS[self.resumed_from]


def _paper_growth(steps: int) -> dm.AdaptationConfig:
    """Algorithm 1 twelve times in a run, each on the records of the half before it."""
    every = max(steps // 12, 2)
    return dm.AdaptationConfig(every_steps=every, window_steps=max(every // 2, 1), seeding="fresh", noise=0.0)


def _split_all(steps: int, part: int = 10, **options: float) -> dm.AdaptationConfig:
    """Every expert splits at one and at two `part`-ths of the run; pruning by share of load to the end."""
    every = max(steps // part, 2)
    return dm.AdaptationConfig(
        every_steps=every,
        window_steps=min(8, every),
        rule="split_all",
        last_growth_step=2 * every,
        prune_below_share=0.1,
        **options,
    )


def _split_strained(steps: int) -> dm.AdaptationConfig:
    """The expert of greatest strain splits, evenly until 40 % of the run."""
    every = max(steps // 30, 2)
    return dm.AdaptationConfig(
        every_steps=every,
        window_steps=min(8, every),
        rule="split_strained",
        last_growth_step=12 * every,
        prune_below_share=0.1,
    )


PAPER, RECOMMENDED, BUDGETED = dm.TopAnyConfig(), dm.TopAnyConfig.recommended(), dm.TopAnyConfig.budgeted(2.0)
# The recommendation of the study before this one.
COSINE = replace(RECOMMENDED, score="cosine", temperature=10.0, diversity_weight=0.01, simplicity_weight=0.01)
BUDGET = dm.BudgetConfig(target_k=2.0)
SMALL, LARGE = "top-any budget 2 of 4", "top-any budget 2"
CONTINUED_SMALL, CONTINUED_LARGE = "trained 4, continued", "trained 16, continued"


def _pool(name: str, group: str, router: RouterConfig, num_experts: int = 16, **options: Any) -> Variant:
    """A variant with a full pool."""
    return Variant(name=name, group=group, router=router, num_experts=num_experts, num_slots=num_experts, **options)


def _references() -> Iterator[Variant]:
    for name, factor in (("dense", 2), ("dense x2", 4)):
        yield Variant(name=name, group="dense", router=None, ffn_hidden_size=factor * EXPERT_FFN)
    for num_experts in (4, 8, 16):
        for k in (1, 2, 4):
            yield _pool(f"top-{k} of {num_experts}", "grid", dm.TopKConfig(k=k), num_experts)


def _routers() -> Iterator[Variant]:
    yield _pool("top-p 0.4", "top-p", dm.TopPConfig(p=0.4))
    yield _pool("top-p budget 2", "top-p", dm.TopPConfig(budget=BUDGET))
    yield _pool("relu 2", "relu", dm.ReluConfig(target_k=2.0))
    yield _pool("relu budget 2", "relu", dm.ReluConfig.budgeted(2.0))
    yield _pool("expert threshold 2", "threshold", dm.ExpertThresholdConfig(target_k=2.0))
    yield _pool("top-any paper", "top-any", PAPER)
    yield _pool("top-any cosine", "top-any cosine", COSINE)
    yield _pool("top-any cosine budget 2", "top-any cosine", replace(COSINE, price_weight=0.0, budget=BUDGET))
    yield _pool("top-any recommended", "top-any", RECOMMENDED)
    yield _pool(LARGE, "top-any", BUDGETED, is_continued=True)
    yield _pool("top-any budget 4", "top-any", dm.TopAnyConfig.budgeted(4.0))
    yield _pool("top-any paper of 4", "top-any", PAPER, 4)
    yield _pool(SMALL, "top-any", BUDGETED, 4, is_continued=True)
    yield _pool("top-any budget 2 of 8", "top-any", BUDGETED, 8)


def _grown() -> Iterator[Variant]:
    yield Variant(
        name="top-any paper, grown from 4",
        group="growth",
        router=PAPER,
        num_experts=4,
        growth=_paper_growth,
        grows_between=("top-any paper of 4", "top-any paper"),
    )
    forms: dict[str, Callable[[int], dm.AdaptationConfig]] = {
        "all": _split_all,
        "all, half of the child reset": partial(_split_all, split_reset_share=0.5),
        "all, rows 30 % apart": partial(_split_all, split_separation=0.3),
        "all, at 5 and 10 %": partial(_split_all, part=20),
        "strained": _split_strained,
    }
    for form, growth in forms.items():
        yield Variant(
            name=f"4 split to 16 ({form})",
            group="growth",
            router=BUDGETED,
            num_experts=4,
            growth=growth,
            grows_between=(SMALL, LARGE),
        )


def _continued() -> Iterator[Variant]:
    """A trained checkpoint goes on: as small as it is, or split; against the large pool trained as long."""
    yield _pool(CONTINUED_SMALL, "continued", BUDGETED, 4, resumed_from=SMALL, lr_factor=0.5)
    yield Variant(
        name="trained 4, continued and split to 16",
        group="continued",
        router=BUDGETED,
        num_experts=4,
        growth=_split_all,
        grows_between=(CONTINUED_SMALL, CONTINUED_LARGE),
        resumed_from=SMALL,
        lr_factor=0.5,
    )
    yield _pool(CONTINUED_LARGE, "continued", BUDGETED, resumed_from=LARGE, lr_factor=0.5)


VARIANTS: dict[str, Variant] = {
    variant.name: variant for variant in (*_references(), *_routers(), *_grown(), *_continued())
}
