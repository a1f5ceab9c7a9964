"""Two ranks that hold the same tokens compute, differentiate and count what one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.moe import neighbours_fault
from tests.helpers.spawn import run_ranks

# Tokens in all, and those that are padding: none, one rank without any, one too many for equal shares.
CASES: list[tuple[int, tuple[int, ...]]] = [(0, ()), (1, ()), (6, (0, 5)), (5, (1,))]


def _pass(num_tokens: int, padding: tuple[int, ...], tp_group: Any) -> dict[str, Any]:
    layer = dm.MoELayer(
        hidden_size=8, ffn_hidden_size=12, num_experts=3, num_slots=4, seed=4, tp_group=tp_group, expert="gelu",
        router=dm.TopAnyConfig(diversity_weight=0.5), shared=torch.nn.Linear(8, 8, bias=False),
    )  # fmt: skip
    layer.shared.weight.data.fill_(0.125)  # type: ignore[union-attr, operator]
    g = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 8, generator=g, requires_grad=True)
    target = torch.randn(num_tokens, 8, generator=g)
    real = torch.ones(num_tokens, dtype=torch.bool)
    real[list(padding)] = False
    with dm.StepLedger() as ledger:
        y = layer(x, token_mask=real if padding else None)
    aux_loss = ledger.aux_loss()
    ((y * target).sum() + aux_loss).backward()
    records = ledger.records()["layer_0"]
    counts = torch.tensor([records.num_tokens, records.num_assignments, *records.tokens_per_slot.tolist()])
    aux_loss = aux_loss.detach().clone()
    if tp_group is not None:
        dist.all_reduce(counts)
        dist.all_reduce(aux_loss)
    grads = {name: param.grad for name, param in layer.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, "aux_loss": aux_loss, "counts": counts, **grads}


def _both(rank: int, world_size: int) -> tuple[list[Any], str]:
    passes = [(_pass(*case, tp_group=dist.group.WORLD), _pass(*case, tp_group=None)) for case in CASES]
    split = torch.nn.Linear(8, 8)
    split.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as caught:
        dm.MoELayer(
            hidden_size=8, ffn_hidden_size=12, num_experts=3, num_slots=4, tp_group=dist.group.WORLD, shared=split
        )
    return passes, str(caught.value)


def test_ranks_with_the_same_tokens_equal_one_rank() -> None:
    for of_rank, refusal in run_ranks(_both, 2):
        assert refusal.startswith("shared.weight of a MoELayer with tp_group are tensor-parallel, but each rank of the")
        for case, (shared_out, alone) in zip(CASES, of_rank, strict=True):
            for name, expected in alone.items():
                torch.testing.assert_close(shared_out[name], expected, msg=lambda m, n=name, c=case: f"{c} {n}: {m}")


@pytest.mark.parametrize(
    ("ranks", "expected"), [([0, 1], None), ([4, 5, 6, 7], None), ([0, 2], [0, 1]), ([1, 2], [0, 1]), ([3, 2], [2, 3])]
)
def test_only_neighbours_share_out_tokens(ranks: list[int], expected: list[int] | None) -> None:
    fault = neighbours_fault("tp_group", ranks)
    assert (fault is None) == (expected is None)
    if fault is not None:
        assert fault.startswith(f"tp_group holds the ranks {ranks} but must be of neighbours, as {expected}, so that")
