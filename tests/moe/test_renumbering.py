"""Records that follow their experts to other slots and other pools."""

import torch

import dynmoe_ds as dm
from dynmoe_ds.moe import Placement, TokenSampler, per_slot_statistics, renumbered
from dynmoe_ds.routing import RoutingRecords


def test_counts_follow_their_experts():
    record = RoutingRecords(
        tokens_per_slot=torch.tensor([5, 0, 7, 2]),
        num_tokens=torch.tensor(9),
        num_assignments=torch.tensor(14),
        num_unrouted=torch.tensor(1),
        unrouted_sum=torch.ones(3, dtype=torch.float64),
        statistics={
            "strain": torch.tensor([0.5, 0.0, 0.7, 0.2], dtype=torch.float64),
            "kinds": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        },
    )
    old = Placement(expert_ids=(4, None, 1, 8), next_id=9, ep_size=1)
    new = Placement(expert_ids=(None, 1, None, 9, None, 4), next_id=10, ep_size=2)  # 8 is gone, 9 is new
    moved = renumbered(record, old, new, {"strain"})
    assert moved.tokens_per_slot.tolist() == [0, 7, 0, 0, 0, 5]
    assert moved.statistics["strain"].tolist() == [0.0, 0.7, 0.0, 0.0, 0.0, 0.5]
    assert moved.statistics["kinds"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert [int(n) for n in (moved.num_tokens, moved.num_assignments, moved.num_unrouted)] == [9, 14, 1]
    assert moved.tokens_per_slot.dtype == torch.int64


def test_the_statistics_of_slots_are_known():
    def layer(router):
        return dm.MoELayer(hidden_size=4, ffn_hidden_size=4, num_experts=2, num_slots=6, router=router)

    assert per_slot_statistics(layer("top_any")) == {"strain"}
    threshold = layer("expert_threshold")
    shapes = threshold.router.statistics_shapes()
    assert per_slot_statistics(threshold) == {"strain", *(name for name, s in shapes.items() if s[:1] == (6,))}
    assert len(per_slot_statistics(threshold)) > 1


def test_a_sample_of_tokens_follows_its_experts():
    layer = dm.MoELayer(hidden_size=2, ffn_hidden_size=4, num_experts=2, num_slots=2)
    sampler = TokenSampler(4)
    hidden = torch.arange(6.0).view(3, 2)
    sampler.add(layer, hidden, torch.tensor([[True, False], [False, True], [True, True]]), None)
    old = layer.placement
    layer.renew_pool(old.resized(5))
    sampler.renumber(layer, old)
    rows, mask = sampler.gather(layer)
    by_token = {tuple(row): chosen for row, chosen in zip(rows.tolist(), mask.tolist(), strict=True)}
    assert layer.placement.expert_ids == (0, None, 1, None, None)
    assert by_token == {
        (0.0, 1.0): [True, False, False, False, False],
        (2.0, 3.0): [False, False, True, False, False],
        (4.0, 5.0): [True, False, True, False, False],
    }


def test_a_renewed_pool_is_of_zeros_and_keeps_its_hooks():
    layer = dm.MoELayer(hidden_size=4, ffn_hidden_size=6, num_experts=2, num_slots=4, router="top_p").to(torch.bfloat16)
    calls = []
    layer.router.register_forward_hook(lambda *_: calls.append("router"))
    layer.renew_pool(layer.placement.resized(7))
    assert (layer.num_slots, layer.local_slots, layer.active.shape) == (7, range(7), (7,))
    assert layer.router.weight.shape == (7, 4) and layer.experts.w1.shape == (7, 6, 4)
    for param in layer.parameters():
        assert param.dtype == torch.bfloat16 and not param.any()
    layer(torch.randn(3, 4, dtype=torch.bfloat16))
    assert calls == ["router"]
    assert layer.state_dict()["expert_ids"].tolist() == [0, -1, -1, 1, -1, -1, -1]
