from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.helpers.fake_apex import FILES, importable_apex
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from dynmoe_ds.models import fuse_norms

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name, param in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(param)
    return model


def _loss(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6)
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


LEFT_OUT: dict[str, tuple[str, ...]] = {
    "apex": (), "no apex": FILES, "apex without its kernel for norms": ("fused_layer_norm_cuda.py",),
}  # fmt: skip


@pytest.fixture(params=LEFT_OUT)
def whose(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Whose norms are to be taken with what is installed."""
    with importable_apex(tmp_path, *LEFT_OUT[request.param]):
        yield "apex" if request.param == "apex" else "torch"


def test_outputs_gradients_and_names_stay(whose: str) -> None:
    plain, fused = _model(), _model()
    assert fuse_norms(fused) == whose
    kinds = {type(module).__name__ for module in fused.modules() if "Norm" in type(module).__name__}
    assert kinds == {"RMSNorm" if whose == "torch" else "FusedRMSNorm"}
    assert list(fused.state_dict()) == list(plain.state_dict())
    losses = [_loss(model) for model in (plain, fused)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for expected, actual in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_a_norm_that_scales_otherwise_is_left_alone() -> None:
    model = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=4, num_key_value_heads=1))
    before = _loss(model)
    fuse_norms(model)
    assert torch.equal(_loss(model), before)
