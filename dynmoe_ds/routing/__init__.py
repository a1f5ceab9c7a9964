"""Routers: which experts a token takes. Every module of this folder is imported, so a new router is one new file."""

from importlib import import_module
from pkgutil import iter_modules

from dynmoe_ds.routing.budget import BudgetConfig
from dynmoe_ds.routing.controllers import update_routers
from dynmoe_ds.routing.records import RoutingRecords
from dynmoe_ds.routing.router import (
    Router,
    RouterConfig,
    Routing,
    build_router,
    register_router,
    router_config,
    router_names,
)
from dynmoe_ds.routing.token_kinds import kind_totals, mean_k_per_kind

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

# Imported by name, since the loop above hides them from type checkers.
from dynmoe_ds.routing.expert_threshold import ExpertThresholdConfig  # noqa: E402
from dynmoe_ds.routing.relu import ReluConfig  # noqa: E402
from dynmoe_ds.routing.top_any import TopAnyConfig  # noqa: E402
from dynmoe_ds.routing.top_k import TopKConfig  # noqa: E402
from dynmoe_ds.routing.top_p import TopPConfig  # noqa: E402

__all__ = [
    "BudgetConfig",
    "ExpertThresholdConfig",
    "ReluConfig",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingRecords",
    "TopAnyConfig",
    "TopKConfig",
    "TopPConfig",
    "build_router",
    "kind_totals",
    "mean_k_per_kind",
    "register_router",
    "router_config",
    "router_names",
    "update_routers",
]
