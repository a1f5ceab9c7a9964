from dataclasses import dataclass

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import Router, RouterConfig, Routing, build_router, router, router_config, router_names


@dataclass(frozen=True)
class FirstConfig(RouterConfig):
    def faults(self):
        return []

    def aux_loss_weights(self):
        return {"zero": 2.0}


class FirstRouter(Router):
    """Sends every token to the first live expert."""

    def forward(self, hidden, active, real):
        mask = torch.zeros(len(hidden), len(active), dtype=torch.bool)
        mask[:, active.nonzero()[0]] = True
        unrouted = torch.zeros(len(hidden), dtype=torch.bool)
        return Routing(mask=mask, weights=mask.float(), aux_losses={"zero": torch.ones(())}, unrouted=unrouted)


@pytest.fixture
def registries(monkeypatch):
    """A registration in a test is undone after it."""
    monkeypatch.setattr(router, "_ROUTERS", dict(router._ROUTERS))
    monkeypatch.setattr(router, "_PRESETS", dict(router._PRESETS))


def test_names():
    names = router_names()
    assert names == tuple(sorted(set(names)))
    assert {"top_any", "top_any_authors_code", "top_any_recommended", "top_k", "top_p", "top_p_budget"} <= set(names)


def test_own_router(registries):
    dm.register_router("first", FirstConfig, first_again=FirstConfig)(FirstRouter)
    assert {"first", "first_again"} <= set(router_names())
    assert isinstance(build_router("first_again", 4, 3), FirstRouter)
    layer = dm.MoELayer(hidden_size=4, ffn_hidden_size=4, num_experts=2, num_slots=3, router=FirstConfig())
    with dm.StepLedger() as ledger:
        layer(torch.randn(5, 4)).sum().backward()
    assert ledger.aux_loss().item() == 2.0
    assert ledger.records()["layer_0"].tokens_per_slot.tolist() == [5, 0, 0]


def test_taken_name_is_refused(registries):
    with pytest.raises(ConfigError, match=r"A router called 'top_any' is registered already\. Choose another name\."):
        dm.register_router("top_any", FirstConfig)(FirstRouter)
    with pytest.raises(ConfigError, match="'top_any_recommended' is registered already"):
        dm.register_router("new", FirstConfig, top_any_recommended=FirstConfig)(FirstRouter)


def test_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"There is no router called 'top_q'\. Use one of .*top_any, top_any_auth"):
        build_router("top_q", 4, 4)


def test_unregistered_configuration_is_refused():
    with pytest.raises(ConfigError, match=r"FirstConfig is not the configuration of a registered router\. Give a name"):
        router_config(FirstConfig())


def test_configuration_is_given_back_as_it_is():
    config = dm.TopAnyConfig(temperature=2.0)
    assert router_config(config) is config


def test_router_starts_with_zero_parameters():
    built = build_router("top_any", 4, 3)
    assert built.weight.shape == (3, 4) and built.threshold.shape == (3,)
    assert not built.weight.any() and not built.threshold.any()
