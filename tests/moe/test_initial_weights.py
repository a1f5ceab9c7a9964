"""Initial weights are a function of seed, layer and expert id alone."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dynmoe_ds as dm
from dynmoe_ds.moe.layer import orthonormal_rows
from tests.helpers.spawn import run_ranks

D, F = 8, 6


def make(expert: str = "swiglu", num_experts: int = 4, num_slots: int = 8, ep_size: int = 1, seed: int | None = 5):
    return dm.MoELayer(
        hidden_size=D,
        ffn_hidden_size=F,
        num_experts=num_experts,
        num_slots=num_slots,
        ep_size=ep_size,
        expert=expert,
        seed=seed,
    )


def by_id(layer: dm.MoELayer) -> dict[tuple[str, int], Tensor]:
    """Rows of all parameters by (name, expert id). Collective for an expert-parallel layer."""
    found = {}
    for name, param in layer.named_parameters():
        value = param.detach()
        if name.startswith("experts.") and layer.ep_size > 1:
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, value.contiguous())
            value = torch.cat(parts[: layer.ep_size])
        found |= {(name, id_): value[slot] for id_, slot in layer.placement.slots_by_id.items()}
    return found


def assert_equal(got: dict, want: dict) -> None:
    assert got.keys() <= want.keys()
    assert all(torch.equal(value, want[key]) for key, value in got.items())


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
@pytest.mark.parametrize("sizes", [{"num_slots": 4}, {"num_slots": 13}, {"num_experts": 1}, {"num_experts": 3}])
def test_experts_are_the_same_by_id_in_every_pool(expert, sizes):
    assert_equal(by_id(make(expert, **sizes)), by_id(make(expert)))


def test_neither_dtype_nor_generator_state_matters():
    want = {key: value.double() for key, value in by_id(make()).items()}
    torch.manual_seed(123)
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        wide = by_id(make())
        torch.set_default_dtype(torch.bfloat16)
        narrow = by_id(make())
    finally:
        torch.set_default_dtype(old)
    assert_equal(wide, want)
    assert_equal(narrow, {key: value.bfloat16() for key, value in want.items()})


def test_seed_and_layer_and_id_matter():
    a, b = by_id(make(seed=5)), by_id(make(seed=6))
    assert not any(torch.equal(a[key], b[key]) for key in a if key[0] != "router.threshold")
    for name in ("router.weight", "experts.w1", "experts.w2", "experts.w3"):
        assert len({a[name, id_].sum().item() for id_ in range(4)}) == 4
    assert not torch.equal(a["experts.w1", 0], a["experts.w3", 0])


def test_torch_s_seed_governs_layers_without_one():
    def two() -> list[dict]:
        torch.manual_seed(11)
        return [by_id(make(seed=None)), by_id(make(seed=None))]

    first, second = two()
    assert not torch.equal(first["experts.w1", 0], second["experts.w1", 0])
    for again, want in zip(two(), (first, second), strict=True):
        assert_equal(again, want)


def test_free_slots_are_zero():
    layer = make("gelu")
    for name, param in layer.named_parameters():
        assert not param[~layer.active].any(), name
        assert name == "router.threshold" or param[layer.active].flatten(1).any(1).all(), name


def test_weights_start_as_those_of_torch_linear():
    layer = make("gelu", num_experts=8)
    for name, bound in {"w1": D**-0.5, "b1": D**-0.5, "w2": F**-0.5, "b2": F**-0.5}.items():
        largest = layer.experts.get_parameter(name).detach().abs().max().item()
        assert 0.9 * bound < largest <= bound, name


def test_gate_rows_are_orthonormal_and_of_length_one_beyond_the_width():
    rows = orthonormal_rows(24, 16, seed=3).double()
    torch.testing.assert_close(rows[:16] @ rows[:16].T, torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(24, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(orthonormal_rows(5, 16, seed=3), orthonormal_rows(24, 16, seed=3)[:5])


@pytest.mark.parametrize("num_experts", [2, 4, 16])
def test_tokens_start_with_about_half_of_the_experts(num_experts):
    layer = dm.MoELayer(hidden_size=64, ffn_hidden_size=4, num_experts=num_experts, num_slots=16, seed=1)
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    with dm.StepLedger() as ledger, torch.no_grad():
        layer(x)
    (record,) = ledger.records().values()
    assert record.mean_k == pytest.approx(num_experts / 2, rel=0.04)
    # Independent fair gates: (1/2)^K of the tokens have none; ALGORITHMS §1.1 gives 24 % for 2, 6 % for 4, 0 % for 16.
    assert record.unrouted_share == pytest.approx(0.5**num_experts, abs=0.03)


def _same_on_ranks(rank: int, world_size: int) -> None:
    for expert in ("swiglu", "gelu"):
        want = by_id(make(expert))
        for ep_size in (2, world_size):
            layer = make(expert, ep_size=ep_size)
            assert layer.experts.w1.shape[0] == 8 // ep_size
            got = by_id(layer)
            assert got.keys() == want.keys()
            assert_equal(got, want)


@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_are_the_same_by_id_on_every_layout(world_size):
    run_ranks(_same_on_ranks, world_size)
