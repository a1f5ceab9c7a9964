"""Dispatch and combine: rows to the experts and back, without a capacity."""

from dynmoe_ds.dispatch.all_to_all import run_all_to_all
from dynmoe_ds.dispatch.config import DispatchConfig
from dynmoe_ds.dispatch.local import run_local
from dynmoe_ds.dispatch.plan import DispatchPlan, plan_dispatch

__all__ = ["DispatchConfig", "DispatchPlan", "plan_dispatch", "run_all_to_all", "run_local"]
