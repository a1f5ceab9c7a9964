"""The layer, the ledger of a step, and which slot holds which expert."""

from dynmoe_ds.moe.layer import MoELayer, layer_faults
from dynmoe_ds.moe.ledger import StepLedger
from dynmoe_ds.moe.padding import PaddingMask
from dynmoe_ds.moe.placement import Placement

__all__ = ["MoELayer", "PaddingMask", "Placement", "StepLedger", "layer_faults"]
