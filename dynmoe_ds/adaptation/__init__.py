"""Adaptation: when experts are added and removed, decided from records and carried out on all ranks or none."""

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.adaptation.controller import AdaptationController
from dynmoe_ds.adaptation.event import AdaptationEvent, alarms, describe
from dynmoe_ds.adaptation.plan import Grow, Move, Plan, Prune
from dynmoe_ds.adaptation.rules import Decision, register_rule
from dynmoe_ds.adaptation.surgery import operate
from dynmoe_ds.adaptation.window import RecordingWindow, add_records

__all__ = [
    "AdaptationConfig",
    "AdaptationController",
    "AdaptationEvent",
    "Decision",
    "Grow",
    "Move",
    "Plan",
    "Prune",
    "RecordingWindow",
    "add_records",
    "alarms",
    "describe",
    "operate",
    "register_rule",
]
