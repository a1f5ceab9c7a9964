from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tests.helpers.fake_apex import MODULES, write_fake_apex
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


@pytest.mark.parametrize("whose", ["torch", "apex"])
def test_outputs_gradients_and_names_stay(whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if whose == "apex":
        write_fake_apex(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
    plain, fused = _model(), _model()
    assert fuse_norms(fused) == whose
    for name in MODULES:
        sys.modules.pop(name, None)
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


def test_an_apex_without_its_kernel_for_norms_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fake_apex(tmp_path)
    (tmp_path / "fused_layer_norm_cuda.py").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert fuse_norms(_model()) == "torch"
    for name in MODULES:
        sys.modules.pop(name, None)
