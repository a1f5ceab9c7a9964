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

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

from dynmoe_ds.routing.top_any import TopAnyConfig  # noqa: E402 - the loop above must not hide this from type checkers

__all__ = [
    "BudgetConfig",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingRecords",
    "TopAnyConfig",
    "build_router",
    "register_router",
    "router_config",
    "router_names",
    "update_routers",
]
