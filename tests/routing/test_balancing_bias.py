import pytest
import torch

from dynmoe_ds.routing import RoutingRecords, TopKConfig, TopPConfig, build_router, update_routers
from dynmoe_ds.routing.balancing_bias import add_selection_bias, bias_faults, move_selection_bias


def test_worked_example():
    # Loads 6, 1, 2 of the live slots have the mean 3; what a free slot holds is not a load.
    bias = torch.tensor([0.5, 0.0, -0.25, 7.0])
    active = torch.tensor([True, True, True, False])
    move_selection_bias(bias, torch.tensor([6, 1, 2, 100]), active, 0.125)
    assert bias.tolist() == [0.375, 0.125, -0.125, 7.0]


def test_an_expert_with_the_mean_load_rests():
    bias = torch.zeros(3)
    move_selection_bias(bias, torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.bool), 0.5)
    assert bias.tolist() == [0.5, 0.0, -0.5]


def test_the_buffer_belongs_to_the_slots_and_is_saved():
    router = build_router(TopKConfig(), 2, 3)
    assert not router.has_controller and router.slot_buffers == ()
    add_selection_bias(router)
    assert router.slot_buffers == ("selection_bias",)
    assert router.state_dict()["selection_bias"].tolist() == [0.0, 0.0, 0.0]
    assert build_router(TopKConfig(), 2, 3).slot_buffers == (), "other routers are not changed"


@pytest.mark.parametrize("config", [TopKConfig(bias_update_speed=0.01), TopPConfig(p=0.5, bias_update_speed=0.01)])
def test_loads_become_even_and_stay_so(config):
    router, live = build_router(config, 6, 6), torch.ones(6, dtype=torch.bool)
    with torch.no_grad():
        router.weight.copy_(torch.eye(6))
    generator = torch.Generator().manual_seed(0)
    lead = torch.tensor([1.5, 1.0, 0.5, 0.0, -0.5, -1.0])  # the first experts are preferred by all tokens
    shares = []
    for _ in range(150):
        hidden = lead + torch.randn(512, 6, generator=generator)
        records = RoutingRecords.of(router(hidden, live, None), hidden, None)
        update_routers({"a": router}, {"a": records}, {"a": live})
        shares.append(records.tokens_per_slot / records.num_assignments)
    assert shares[0].max() > 1.8 / 6
    assert torch.stack(shares[-20:]).mean(0).max() < 1.15 / 6


def test_faults():
    assert bias_faults(0.0) == bias_faults(1e-3) == []
    assert bias_faults(float("nan")) == ["router.bias_update_speed is nan but must not be negative."]
