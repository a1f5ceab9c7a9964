"""Mixture-of-experts training on stock DeepSpeed: tokens choose their number of experts, experts come and go."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynmoe_ds import errors

if TYPE_CHECKING:
    from dynmoe_ds.adaptation import AdaptationConfig, AdaptationController
    from dynmoe_ds.config.load import load_config
    from dynmoe_ds.engine import initialize
    from dynmoe_ds.moe import MoELayer, StepLedger
    from dynmoe_ds.routing import Router, RouterConfig, Routing, RoutingRecords, TopAnyConfig, register_router
    from dynmoe_ds.training import Trainer

# torch, DeepSpeed, Hydra and transformers take seconds to import: only those who use them pay for it.
_ROOMS = {
    "AdaptationConfig": "adaptation",
    "AdaptationController": "adaptation",
    "MoELayer": "moe",
    "Router": "routing",
    "RouterConfig": "routing",
    "Routing": "routing",
    "RoutingRecords": "routing",
    "StepLedger": "moe",
    "TopAnyConfig": "routing",
    "Trainer": "training",
    "initialize": "engine",
    "load_config": "config.load",
    "register_router": "routing",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


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
