"""Rules: pure functions from one layer's records to what should change in it, and the paper's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.moe import Placement
from dynmoe_ds.routing import RouterConfig, RoutingRecords


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decision:
    """What a rule wants. pruned_ids: experts to remove. split_ids: experts to split in two, the most urgent first.

    new_gate_row: [D] of length 1 of the expert to add, None to add none.
    """

    pruned_ids: tuple[int, ...] = ()
    split_ids: tuple[int, ...] = ()
    new_gate_row: Tensor | None = None


Decide = Callable[[RoutingRecords, Placement, AdaptationConfig], Decision]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A registered rule and what it needs.

    decide: from the records of a window, summed over all ranks, to a decision; pure. needs_strain: the records must
    hold `statistics["strain"]`. needs_sample: its splits want a sample of the layer's tokens. needs_unrouted: it adds
    experts for tokens that choose none. needs_unequal_loads: it goes by differences between the experts' loads.
    """

    decide: Decide
    needs_strain: bool
    needs_sample: bool
    needs_unrouted: bool
    needs_unequal_loads: bool


_RULES: dict[str, Rule] = {}


def register_rule(
    name: str,
    *,
    needs_strain: bool = False,
    needs_sample: bool = False,
    needs_unrouted: bool = False,
    needs_unequal_loads: bool = False,
) -> Callable[[Decide], Decide]:
    """Decorator that makes a rule available as `adaptation.rule=name`; what it may need is described at `Rule`.

    Raises: ConfigError for a name that is taken.
    """

    def add(decide: Decide) -> Decide:
        if name in _RULES:
            raise ConfigError(f"An adaptation rule called {name!r} is registered already. Choose another name.")
        _RULES[name] = Rule(
            decide=decide,
            needs_strain=needs_strain,
            needs_sample=needs_sample,
            needs_unrouted=needs_unrouted,
            needs_unequal_loads=needs_unequal_loads,
        )
        return decide

    return add


def rule_named(name: str) -> Rule:
    """Raises: ConfigError for an unknown name."""
    if name not in _RULES:
        raise ConfigError(f"adaptation.rule is {name!r}. Use one of {', '.join(sorted(_RULES))}.")
    return _RULES[name]


def rule_fault(config: AdaptationConfig, router: RouterConfig) -> str | None:
    """Why a configuration's rule makes no sense for a router, or does not exist, as a sentence; None if it is sound.

    A rule that may not add an expert at any step (`last_growth_step` 0) only prunes, which makes sense for all routers.
    """
    try:
        objection = _objection(rule_named(config.rule), router)
    except ConfigError as e:
        return str(e)
    if objection is None or config.last_growth_step == 0:
        return None
    others = [name for name, rule in sorted(_RULES.items()) if _objection(rule, router) is None]
    return (
        f"adaptation.rule is {config.rule}, which {objection}. Use adaptation.rule={' or '.join(others)}, or "
        "adaptation.last_growth_step=0 to prune only."
    )


def _objection(rule: Rule, router: RouterConfig) -> str | None:
    kind = type(router).__name__
    if rule.needs_unrouted and not router.may_leave_unrouted:
        return f"adds an expert when tokens choose none, but with {kind} every token has an expert"
    if rule.needs_unequal_loads and router.has_equal_loads:
        return f"goes by differences of load, but with {kind} all experts have the same load"
    return None


@register_rule("paper", needs_unrouted=True)
def paper_rule(records: RoutingRecords, placement: Placement, config: AdaptationConfig) -> Decision:
    """Prune what nobody chose; add one expert if tokens chose nobody, with gate row R_S / |R_S|.

    A window without tokens changes nothing. `min_unrouted_share` and `prune_below_share` make both conditions less
    touchy; at 0 they are the paper's.
    Source: arXiv 2405.14297, Algorithm 1, lines 17 to 26.
    """
    num_unrouted, num_tokens = int(records.num_unrouted), int(records.num_tokens)
    length = torch.linalg.vector_norm(records.unrouted_sum)
    is_wanted = num_unrouted > config.min_unrouted_share * num_tokens and float(length) > 0
    row = records.unrouted_sum / length if is_wanted else None
    return Decision(pruned_ids=idle_experts(records, placement, config), new_gate_row=row)


def idle_experts(records: RoutingRecords, placement: Placement, config: AdaptationConfig) -> tuple[int, ...]:
    """The experts to prune: those that nobody chose, or whose load is below `prune_below_share` of the mean load.

    None in a window without tokens; and one expert always stays (the busiest, then the oldest).
    """
    if int(records.num_tokens) == 0:
        return ()
    load = tokens_per_expert(records, placement)
    floor = config.prune_below_share * sum(load.values()) / len(load)
    idle = [expert_id for expert_id, tokens in load.items() if tokens == 0 or tokens < floor]
    if len(idle) == len(load):
        idle.remove(busiest_first(load)[0])
    return tuple(idle)


def tokens_per_expert(records: RoutingRecords, placement: Placement) -> dict[int, int]:
    """Tokens sent to each live expert, by id in ascending order."""
    counts: Mapping[int, int] = dict(enumerate(records.tokens_per_slot.tolist()))
    return {expert_id: counts[slot] for expert_id, slot in placement.slots_by_id.items()}


def busiest_first(load: Mapping[int, float]) -> list[int]:
    """The ids of `load` by descending load; of equals the oldest first."""
    return sorted(load, key=lambda expert_id: (-load[expert_id], expert_id))
