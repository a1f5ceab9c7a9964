"""Active parameters per token, added up token by token."""

import pytest
import torch
from tests.helpers.run_config import small_run
from torch import nn

import dynmoe_ds as dm
from dynmoe_ds.models import build_decoder, count_parameters
from dynmoe_ds.moe import MoELayer, Placement
from dynmoe_ds.routing import router_config

VOCAB_SIZE = 40
NULLS = {"num_null_experts": 2, "null_expert": "identity"}
MODELS = {
    "tied": {},
    "untied": {"model__tie_embeddings": False},
    "experts with biases": {"expert__kind": "gelu"},
    "softmax without thresholds": {"router": type(router_config("top_p"))(p=0.6)},
    "null experts": {"router": type(router_config("top_k"))(k=3, **NULLS)},
}


def _model(name: str) -> nn.Module:
    config = small_run(model__num_layers=4, **MODELS[name])
    return build_decoder(config, VOCAB_SIZE, eos_token_id=0)


def _layers(model: nn.Module) -> dict[str, MoELayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    for name, layer in found.items():
        layer.name = name
    return found


def _met_by_tokens(model: nn.Module, masks: dict[str, torch.Tensor]) -> float:
    """Mean over tokens of the parameters they meet; every parameter by name, experts and gates slot by slot."""
    layers, num_tokens = _layers(model), len(next(iter(masks.values())))
    total = 0
    for name, parameter in model.named_parameters():
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        for token in range(num_tokens):
            if owner is None or name.endswith("null_weight"):
                total += parameter.numel()
                continue
            is_met = masks[owner][token] if ".experts." in name else layers[owner].active
            total += sum(parameter[slot].numel() for slot in range(len(parameter)) if is_met[slot])
    return total / num_tokens


def _routed(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Masks [T, S] and mean k of one pass, by layer."""
    masks: dict[str, torch.Tensor] = {}
    for name, layer in _layers(model).items():
        layer.router.register_forward_hook(lambda _, args, routing, name=name: masks.__setitem__(name, routing.mask))
    ids = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(1))
    with dm.StepLedger() as ledger:
        model(input_ids=ids)
    return masks, {name: record.mean_k for name, record in ledger.records().items()}


@pytest.mark.parametrize("name", MODELS)
def test_active_parameters_are_those_that_tokens_meet(name):
    model = _model(name)
    masks, mean_k = _routed(model)
    assert len(mean_k) == 2 and any(k != round(k) for k in mean_k.values()), "the example must have fractions"
    count = count_parameters(model, ep_size=1)
    assert count.active_per_token(mean_k) == pytest.approx(_met_by_tokens(model, masks), rel=1e-12)


def test_active_parameters_follow_births_and_deaths():
    """Counted with 4 live experts; then one layer has 6 and the other 1."""
    model = _model("tied")
    count = count_parameters(model, ep_size=1)
    grown, pruned = _layers(model).values()
    grown.placement = Placement(expert_ids=(0, 1, 2, 3, 4, 5, None, None), next_id=6, ep_size=1)
    pruned.placement = Placement(expert_ids=(None, 1, *[None] * 6), next_id=6, ep_size=1)
    masks, mean_k = _routed(model)
    num_live = {name: len(layer.placement.live_ids) for name, layer in _layers(model).items()}
    assert list(num_live.values()) == [6, 1]
    expected = _met_by_tokens(model, masks)
    assert count.active_per_token(mean_k, num_live) == pytest.approx(expected, rel=1e-12)
    assert count_parameters(model, ep_size=1).active_per_token(mean_k) == pytest.approx(expected, rel=1e-12)
    assert count.active_per_token(mean_k) != pytest.approx(expected, rel=1e-12)


def test_without_experts_all_parameters_are_active():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3))
    assert count_parameters(model, ep_size=1).active_per_token({}) == 15 + 12
