"""What is compared: a router, a pool and how it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

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


def _all() -> list[Variant]:
    paper, recommended = dm.TopAnyConfig(), dm.TopAnyConfig.recommended()
    # The recommendation of the study before this one.
    cosine = replace(recommended, score="cosine", temperature=10.0, diversity_weight=0.01, simplicity_weight=0.01)
    found = [
        Variant(name="dense", group="dense", router=None, ffn_hidden_size=2 * EXPERT_FFN),
        Variant(name="dense x2", group="dense", router=None, ffn_hidden_size=4 * EXPERT_FFN),
    ]
    for num_experts in (4, 8, 16):
        for k in (1, 2, 4):
            found.append(
                Variant(
                    name=f"top-{k} of {num_experts}",
                    group="grid",
                    router=dm.TopKConfig(k=k),
                    num_experts=num_experts,
                    num_slots=num_experts,
                )
            )
    budget = dm.BudgetConfig(target_k=2.0)
    found += [
        Variant(name="top-p 0.4", group="top-p", router=dm.TopPConfig(p=0.4)),
        Variant(name="top-p budget 2", group="top-p", router=dm.TopPConfig(budget=budget)),
        Variant(name="relu 2", group="relu", router=dm.ReluConfig(target_k=2.0)),
        Variant(name="relu budget 2", group="relu", router=dm.ReluConfig.budgeted(2.0)),
        Variant(name="expert threshold 2", group="threshold", router=dm.ExpertThresholdConfig(target_k=2.0)),
        Variant(name="top-any paper", group="top-any", router=paper),
        Variant(name="top-any cosine", group="top-any cosine", router=cosine),
        Variant(
            name="top-any cosine budget 2",
            group="top-any cosine",
            router=replace(cosine, price_weight=0.0, budget=budget),
        ),
        Variant(name="top-any recommended", group="top-any", router=recommended),
        Variant(name="top-any budget 2", group="top-any", router=dm.TopAnyConfig.budgeted(2.0), is_continued=True),
        Variant(name="top-any budget 4", group="top-any", router=dm.TopAnyConfig.budgeted(4.0)),
        Variant(
            name="top-any paper, grown from 4",
            group="growth",
            router=paper,
            num_experts=4,
            growth=_paper_growth,
            grows_between=("top-any paper of 4", "top-any paper"),
        ),
        Variant(name="top-any paper of 4", group="top-any", router=paper, num_experts=4, num_slots=4),
    ]
    budgeted = dm.TopAnyConfig.budgeted(2.0)
    for num_experts in (4, 8):
        found.append(
            Variant(
                name=f"top-any budget 2 of {num_experts}",
                group="top-any",
                router=budgeted,
                num_experts=num_experts,
                num_slots=num_experts,
                is_continued=num_experts == 4,
            )
        )
    small, large = "top-any budget 2 of 4", "top-any budget 2"
    attempts: dict[str, Callable[[int], dm.AdaptationConfig]] = {
        "all": _split_all,
        "all, half of the child reset": partial(_split_all, split_reset_share=0.5),
        "all, rows 30 % apart": partial(_split_all, split_separation=0.3),
        "all, at 5 and 10 %": partial(_split_all, part=20),
        "strained": _split_strained,
    }
    for rule, growth in attempts.items():
        found.append(
            Variant(
                name=f"4 split to 16 ({rule})",
                group="growth",
                router=budgeted,
                num_experts=4,
                growth=growth,
                grows_between=(small, large),
            )
        )
    # A trained checkpoint that continues: as small as it is, or split; against the large pool trained as long.
    found += [
        Variant(
            name="trained 4, continued",
            group="continued",
            router=budgeted,
            num_experts=4,
            num_slots=4,
            resumed_from=small,
            lr_factor=0.5,
        ),
        Variant(
            name="trained 4, continued and split to 16",
            group="continued",
            router=budgeted,
            num_experts=4,
            growth=_split_all,
            grows_between=("trained 4, continued", "trained 16, continued"),
            resumed_from=small,
            lr_factor=0.5,
        ),
        Variant(name="trained 16, continued", group="continued", router=budgeted, resumed_from=large, lr_factor=0.5),
    ]
    return found


VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _all()}
