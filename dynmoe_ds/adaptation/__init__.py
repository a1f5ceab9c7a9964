"""Adaptation: when experts are added and removed, decided from records and carried out on all ranks or none."""

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.adaptation.controller import AdaptationController
from dynmoe_ds.adaptation.event import AdaptationEvent, alarms, describe
from dynmoe_ds.adaptation.lives import ExpertLives
from dynmoe_ds.adaptation.plan import Grow, Move, Plan, Prune, Split
from dynmoe_ds.adaptation.pool import sizes_to_grow, sizes_to_shrink
from dynmoe_ds.adaptation.rebalancing import imbalance, rank_loads, rebalancing_moves
from dynmoe_ds.adaptation.rules import Decision, register_rule, rule_fault
from dynmoe_ds.adaptation.split_rules import split_all, split_loaded, split_strained
from dynmoe_ds.adaptation.surgery import operate
from dynmoe_ds.adaptation.window import RecordingWindow, add_records

__all__ = [
    "AdaptationConfig",
    "AdaptationController",
    "AdaptationEvent",
    "Decision",
    "ExpertLives",
    "Grow",
    "Move",
    "Plan",
    "Prune",
    "RecordingWindow",
    "Split",
    "add_records",
    "alarms",
    "describe",
    "imbalance",
    "operate",
    "rank_loads",
    "rebalancing_moves",
    "register_rule",
    "rule_fault",
    "sizes_to_grow",
    "sizes_to_shrink",
    "split_all",
    "split_loaded",
    "split_strained",
]
