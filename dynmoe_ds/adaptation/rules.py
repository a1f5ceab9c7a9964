"""Rules: pure functions from one layer's records to what should change in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.moe import Placement
from dynmoe_ds.routing import RoutingRecords


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decision:
    """pruned_ids: experts to remove. new_gate_row: [D] of length 1 of the expert to add, None to add none."""

    pruned_ids: tuple[int, ...]
    new_gate_row: Tensor | None


Rule = Callable[[RoutingRecords, Placement, AdaptationConfig], Decision]

_RULES: dict[str, Rule] = {}


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Decorator that makes a rule available as `adaptation.rule=name`. Raises: ConfigError for a name that is taken."""

    def add(rule: Rule) -> Rule:
        if name in _RULES:
            raise ConfigError(f"An adaptation rule called {name!r} is registered already. Choose another name.")
        _RULES[name] = rule
        return rule

    return add


def rule_named(name: str) -> Rule:
    """Raises: ConfigError for an unknown name."""
    if name not in _RULES:
        raise ConfigError(f"adaptation.rule is {name!r}. Use one of {', '.join(sorted(_RULES))}.")
    return _RULES[name]


@register_rule("paper")
def paper_rule(records: RoutingRecords, placement: Placement, config: AdaptationConfig) -> Decision:
    """Prune what nobody chose; add one expert if tokens chose nobody, with gate row R_S / |R_S|.

    A window without tokens changes nothing, and one expert always stays (the busiest, then the oldest).
    `min_unrouted_share` and `prune_below_share` make both conditions less touchy; at 0 they are the paper's.
    Source: arXiv 2405.14297, Algorithm 1, lines 17 to 26.
    """
    if int(records.num_tokens) == 0:
        return Decision(pruned_ids=(), new_gate_row=None)
    load = tokens_per_expert(records, placement)
    floor = config.prune_below_share * sum(load.values()) / len(load)
    idle = [expert_id for expert_id, tokens in load.items() if tokens == 0 or tokens < floor]
    if len(idle) == len(load):
        idle.remove(max(load, key=lambda expert_id: (load[expert_id], -expert_id)))

    num_unrouted, num_tokens = int(records.num_unrouted), int(records.num_tokens)
    length = torch.linalg.vector_norm(records.unrouted_sum)
    is_wanted = num_unrouted > config.min_unrouted_share * num_tokens and float(length) > 0
    row = records.unrouted_sum / length if is_wanted else None
    return Decision(pruned_ids=tuple(idle), new_gate_row=row)


def tokens_per_expert(records: RoutingRecords, placement: Placement) -> dict[int, int]:
    """Tokens sent to each live expert, by id in ascending order."""
    counts: Mapping[int, int] = dict(enumerate(records.tokens_per_slot.tolist()))
    return {expert_id: counts[slot] for expert_id, slot in placement.slots_by_id.items()}
