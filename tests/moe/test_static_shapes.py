"""`DispatchConfig(static_shapes=True)`: shapes that do not depend on the tokens, and no wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.moe.token_sampler import TokenSampler
from dynmoe_ds.routing import router_names
from tests.helpers.no_waiting import NoWaiting
from tests.helpers.reference import randomise

ROUTERS = {
    "top_any without a bound": "top_any",
    "top_any": dm.TopAnyConfig(k_max=2),
    "top_k": dm.TopKConfig(k=3),
}


def make(router: Any, expert: str, dispatch: dm.DispatchConfig, dtype: torch.dtype = torch.float32) -> dm.MoELayer:
    layer = dm.MoELayer(
        hidden_size=8,
        ffn_hidden_size=16,
        num_experts=4,
        num_slots=5,
        router=router,
        expert=expert,
        seed=0,
        dispatch=dispatch,
    )
    if router == "top_any":
        randomise(layer)
    return layer.to(dtype)


def run(layer: dm.MoELayer, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with dm.StepLedger() as ledger:
        y = layer(x)
    (y.square().sum() + ledger.aux_loss()).backward()
    return [y.detach(), x.grad, *(param.grad for param in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 21])
@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_results_are_those_of_exact_shapes(router, expert, num_tokens, dtype):
    x = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = run(make(router, expert, dm.DispatchConfig(), dtype), x)
    static = run(make(router, expert, dm.DispatchConfig(static_shapes=True), dtype), x)
    for got, want in zip(static, exact, strict=True):
        assert torch.equal(got, want) or torch.allclose(got, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
        assert got.isfinite().all()


@pytest.mark.parametrize(("router", "most"), [(ROUTERS["top_any"], 2), (ROUTERS["top_k"], 3), ("top_any", 5)])
def test_room_is_for_the_most_that_the_router_can_choose(router, most):
    layer = make(router, "swiglu", dm.DispatchConfig(static_shapes=True))
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for seed in range(2):
        layer(torch.randn(7, 8, generator=torch.Generator().manual_seed(seed)))
    assert seen == [7 * most] * 2


def test_nothing_waits_for_the_device():
    x = torch.randn(7, 8, requires_grad=True)
    layer = make(
        ROUTERS["top_any"], "gelu", dm.DispatchConfig(static_shapes=True)
    )  # on a CPU SwiGLU asks for the rows of slots
    with NoWaiting():
        layer(x).square().sum().backward()
    layer.dispatch = dm.DispatchConfig()
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        layer(x)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is not a CPU and whose tensors have no values: whatever must know one fails."""
    real = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, **k: real("cpu" if device == "meta" else device, **k))
    return torch.device("meta")


@pytest.mark.parametrize(
    ("router", "expert"), [(name, "swiglu") for name in router_names()] + [("top_any", "geglu"), ("top_any", "gelu")]
)
def test_no_value_is_needed_whatever_is_recorded(meta, router, expert):
    layer = make(router, expert, dm.DispatchConfig(static_shapes=True), torch.bfloat16).to(meta)
    x = torch.empty(2, 7, 8, dtype=torch.bfloat16, device=meta, requires_grad=True)
    real, kinds = torch.empty(2, 7, dtype=torch.bool, device=meta), torch.empty(2, 7, dtype=torch.int64, device=meta)
    given = {"with_strain": True, "sampler": TokenSampler(4), "token_kinds": kinds, "num_kinds": 2}
    with dm.StepLedger(**given) as ledger:
        outputs = [layer(x, token_mask=real) for _ in range(2)]
    (sum(y.square().sum() for y in outputs) + ledger.aux_loss()).backward()
    ((_, record),) = ledger.records().items()
    assert x.grad.device == record.unrouted_sum.device == meta
    assert {"strain", "tokens_per_kind"} <= set(record.statistics)
    layer.dispatch = dm.DispatchConfig()  # the control: without static shapes values are needed, which meta has not
    with pytest.raises(NotImplementedError, match="nonzero"):
        layer(x)


def test_it_is_refused_between_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    layer = dm.MoELayer(hidden_size=8, ffn_hidden_size=8, num_experts=2, num_slots=2, ep_size=2)
    with pytest.raises(ConfigError, match=r"dispatch\.static_shapes is true and ep_size 2, but how many rows"):
        layer.dispatch = dm.DispatchConfig(static_shapes=True)
