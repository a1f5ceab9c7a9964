"""Surgery on what a router holds beside gate rows: a balancing bias follows its expert, null experts stay."""

import torch

from dynmoe_ds.adaptation import Move, Plan, Prune, operate
from dynmoe_ds.moe import MoELayer
from dynmoe_ds.routing import TopKConfig
from tests.adaptation.test_surgery import SLOTS, D, PlainMasters, config, grow

BIAS = [0.5, 0.0, -0.25, 0.0, 0.125, 0.0]  # experts 0, 1, 2 in slots 0, 2, 4


def after(*items):
    router = TopKConfig(bias_update_speed=0.1, num_null_experts=2)
    layer = MoELayer(hidden_size=D, ffn_hidden_size=3, num_experts=3, num_slots=SLOTS, router=router, seed=1)
    layer.router.selection_bias.copy_(torch.tensor(BIAS))
    nulls = layer.router.null_weight.detach().clone()
    operate(Plan(items=items), {"a": layer}, PlainMasters(layer), config())
    assert torch.equal(layer.router.null_weight, nulls) and nulls.any()
    return layer.router.selection_bias.tolist()


def test_a_pruned_expert_leaves_no_bias():
    assert after(Prune(layer="a", expert_id=0)) == [0.0, 0.0, -0.25, 0.0, 0.125, 0.0]


def test_a_moved_expert_takes_its_bias_along():
    assert after(Move(layer="a", expert_id=1, to_slot=3)) == [0.5, 0.0, 0.0, -0.25, 0.125, 0.0]


def test_exchanged_experts_take_their_biases_along():
    item = Move(layer="a", expert_id=1, to_slot=4, exchange_with=2)
    assert after(item) == [0.5, 0.0, 0.125, 0.0, -0.25, 0.0]


def test_a_new_expert_starts_with_the_mean_bias():
    assert after(grow("fresh")) == [0.5, 0.0, -0.25, 0.0, 0.125, 0.125]
