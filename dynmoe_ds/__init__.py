"""Mixture-of-experts training on stock DeepSpeed: tokens choose their number of experts, experts come and go."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynmoe_ds import errors

if TYPE_CHECKING:
    from dynmoe_ds.adaptation import AdaptationConfig, AdaptationController
    from dynmoe_ds.config.load import load_config
    from dynmoe_ds.dispatch import DispatchConfig
    from dynmoe_ds.engine import initialize
    from dynmoe_ds.export import (
        export_hugging_face,
        import_dynmoe_checkpoint,
        import_published_model,
        import_top_k_model,
        load_model,
        register_auto_classes,
        save_model,
    )
    from dynmoe_ds.moe import MoELayer, StepLedger, upcycle
    from dynmoe_ds.routing import (
        BudgetConfig,
        ExpertThresholdConfig,
        ReluConfig,
        Router,
        RouterConfig,
        Routing,
        RoutingRecords,
        TopAnyConfig,
        TopKConfig,
        TopPConfig,
        mean_k_per_kind,
        register_router,
    )
    from dynmoe_ds.training import Trainer

# torch, DeepSpeed, Hydra and transformers take seconds to import: only those who use them pay for it.
_ROOMS = {
    "AdaptationConfig": "adaptation",
    "AdaptationController": "adaptation",
    "BudgetConfig": "routing",
    "DispatchConfig": "dispatch",
    "ExpertThresholdConfig": "routing",
    "MoELayer": "moe",
    "ReluConfig": "routing",
    "Router": "routing",
    "RouterConfig": "routing",
    "Routing": "routing",
    "RoutingRecords": "routing",
    "StepLedger": "moe",
    "TopAnyConfig": "routing",
    "TopKConfig": "routing",
    "TopPConfig": "routing",
    "Trainer": "training",
    "export_hugging_face": "export",
    "import_dynmoe_checkpoint": "export",
    "import_published_model": "export",
    "import_top_k_model": "export",
    "initialize": "engine",
    "load_config": "config.load",
    "load_model": "export",
    "mean_k_per_kind": "routing",
    "register_auto_classes": "export",
    "register_router": "routing",
    "save_model": "export",
    "upcycle": "moe",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


__all__ = [
    "AdaptationConfig",
    "AdaptationController",
    "BudgetConfig",
    "DispatchConfig",
    "ExpertThresholdConfig",
    "MoELayer",
    "ReluConfig",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingRecords",
    "StepLedger",
    "TopAnyConfig",
    "TopKConfig",
    "TopPConfig",
    "Trainer",
    "errors",
    "export_hugging_face",
    "import_dynmoe_checkpoint",
    "import_published_model",
    "import_top_k_model",
    "initialize",
    "load_config",
    "load_model",
    "mean_k_per_kind",
    "register_auto_classes",
    "register_router",
    "save_model",
    "upcycle",
]
