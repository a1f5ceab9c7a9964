"""Mixture-of-experts training on stock DeepSpeed: tokens choose how many experts they use, experts grow and are pruned."""

from typing import TYPE_CHECKING, Any

from dynmoe_ds import errors
from dynmoe_ds.adaptation import AdaptationConfig, AdaptationController
from dynmoe_ds.moe import MoELayer, StepLedger
from dynmoe_ds.routing import Router, RouterConfig, Routing, RoutingRecords, TopAnyConfig, register_router

if TYPE_CHECKING:
    from dynmoe_ds.config import load_config
    from dynmoe_ds.engine import initialize
    from dynmoe_ds.training import Trainer

# Importing DeepSpeed, Hydra or transformers takes seconds: only those who use them pay for it.
_LAZY = {"initialize": "dynmoe_ds.engine", "load_config": "dynmoe_ds.config", "Trainer": "dynmoe_ds.training"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdaptationConfig",
    "AdaptationController",
    "MoELayer",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingRecords",
    "StepLedger",
    "TopAnyConfig",
    "Trainer",
    "errors",
    "initialize",
    "load_config",
    "register_router",
]
