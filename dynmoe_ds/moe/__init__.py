"""The layer, the ledger of a step, and which slot holds which expert."""

from dynmoe_ds.moe.labels import labelled
from dynmoe_ds.moe.layer import MoELayer, layer_faults, moe_layers, watch_padding
from dynmoe_ds.moe.layer_traffic import LayerTraffic
from dynmoe_ds.moe.ledger import StepLedger
from dynmoe_ds.moe.padding import PaddingMask
from dynmoe_ds.moe.placement import Placement
from dynmoe_ds.moe.renumbering import per_slot_statistics, renumbered
from dynmoe_ds.moe.seeds import layer_seed
from dynmoe_ds.moe.token_sampler import TokenSampler
from dynmoe_ds.moe.token_shares import is_shard, neighbours_fault
from dynmoe_ds.moe.upcycle import upcycle

__all__ = [
    "LayerTraffic",
    "MoELayer",
    "PaddingMask",
    "Placement",
    "StepLedger",
    "TokenSampler",
    "labelled",
    "layer_faults",
    "is_shard",
    "moe_layers",
    "neighbours_fault",
    "per_slot_statistics",
    "renumbered",
    "layer_seed",
    "upcycle",
    "watch_padding",
]
