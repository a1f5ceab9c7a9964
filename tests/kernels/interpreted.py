"""The kernels' cases in Triton's interpreter: run by test_interpreter.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dynmoe_ds as dm
from dynmoe_ds.experts.gated import GatedExperts, GatedOfAllSlots
from dynmoe_kernels import forced_kernels
from tests.helpers.reference import assert_near, randomise
from tests.kernels.cases import LAYERS, Case, kernel_cases


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_a_kernel(case: Case) -> None:
    with forced_kernels("triton"):
        case.run("cpu")


@pytest.mark.parametrize(("expert", "static_shapes"), LAYERS)
def test_a_layer_through_the_kernels(expert: str, static_shapes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the kernels do between a layer's input and its gradients, as the twins do it."""

    def all_slots(experts: GatedExperts, rows: Tensor, weights: Tensor, rows_per_slot: Tensor) -> Tensor:
        slot_ends = rows_per_slot.cumsum(0, dtype=torch.int32)
        return GatedOfAllSlots.apply(rows, weights, slot_ends, experts.w1, experts.w3, experts.w2, "silu")

    monkeypatch.setattr(GatedExperts, "forward", all_slots)  # as on a GPU, where the kernels belong
    dispatch = dm.DispatchConfig(static_shapes=static_shapes)
    layer = dm.MoELayer(
        hidden_size=16, ffn_hidden_size=24, num_experts=3, num_slots=4, expert=expert, seed=0, dispatch=dispatch
    )
    randomise(layer)
    tokens = torch.randn(11, 16, generator=torch.Generator().manual_seed(0))

    def run(choice: str) -> list[Tensor]:
        layer.zero_grad()
        x = tokens.clone().requires_grad_()
        with forced_kernels(choice), dm.StepLedger() as ledger:
            y = layer(x, token_mask=torch.arange(11) < 9)
            (y.square().sum() + ledger.aux_loss()).backward()
        return [y, x.grad, *(param.grad for param in layer.parameters())]

    twins = run("torch")
    assert twins[0].abs().sum() > 0
    for got, want in zip(run("triton"), twins, strict=True):
        assert_near(got, want)
