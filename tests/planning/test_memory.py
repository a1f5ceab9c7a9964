"""Memory against what real engines hold, and what autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import dynmoe_ds as dm
from dynmoe_ds.config.deepspeed_json import to_deepspeed
from dynmoe_ds.models import build_decoder, parameter_groups
from dynmoe_ds.planning import memory_per_rank, shape_of
from dynmoe_ds.planning.memory import BUCKET_ELEMENTS, activation_bytes
from dynmoe_ds.routing import TopKConfig
from tests.helpers.run_config import small_run
from tests.helpers.spawn import run_ranks
from tests.planning.examples import layout, shape

NUM_RANKS, VOCAB = 2, 400
STATES = ("weights", "gradients", "masters", "moments")
CASES = [(stage, ep_size, dtype) for stage in range(4) for ep_size in (1, 2) for dtype in ("float32", "bfloat16")]


def _config(stage: int, ep_size: int, dtype: str) -> Any:
    return small_run(
        router=TopKConfig(k=2),
        parallel__num_ranks=NUM_RANKS,
        parallel__zero_stage=stage,
        parallel__ep_size=ep_size,
        parallel__dtype=dtype,
    )


def _states(rank: int, world_size: int) -> list[dict[str, int]]:
    found = []
    for case in CASES:
        config = _config(*case)
        model = build_decoder(config, VOCAB, 0)
        engine = dm.initialize(model, to_deepspeed(config), model_parameters=parameter_groups(model, 0.1))
        ids = torch.zeros(4, 24, dtype=torch.int64)
        for _ in range(2):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            held = engine.masters.memory_of(model.parameters())
            engine.step()
        found.append(held)
    return found


@pytest.fixture(scope="module")
def states() -> list[list[dict[str, int]]]:
    return run_ranks(_states, NUM_RANKS, timeout_s=240)


@pytest.mark.parametrize("case", CASES)
def test_what_zero_leaves_on_a_rank(states, case) -> None:
    """Exactly, but for gradients of stage 1: after the reduction DeepSpeed counts a rank's own only."""
    stage, ep_size, dtype = case
    config = _config(*case)
    plan = layout(num_ranks=NUM_RANKS, ep_size=ep_size, zero_stage=stage, dtype=dtype)
    want = memory_per_rank(shape_of(config, None), plan, commits_on_touch=False)
    for of_rank in states:
        held = of_rank[CASES.index(case)]
        if stage == 1:
            split = memory_per_rank(
                shape_of(config, None), layout(num_ranks=2, ep_size=ep_size, zero_stage=2, dtype=dtype),
                commits_on_touch=False,
            )  # fmt: skip
            assert held["gradients"] == split.gradients < want.gradients
        names = [name for name in STATES if (stage, name) != (1, "gradients")]
        assert {name: held[name] for name in names} == {name: getattr(want, name) for name in names}


def _saved_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Of distinct storages that the backward pass needs, parameters and buffers excepted."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
        assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("shared", [0, 256])
@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_activations_of_a_real_decoder(dtype, k, expert, shared) -> None:
    """Within 5 %: masks and positions of tokens are not in the model."""
    config = small_run(
        router=TopKConfig(k=k), expert__kind=expert, model__hidden_size=128, model__expert_ffn_hidden_size=192,
        model__dense_ffn_hidden_size=320, model__num_layers=4, data__vocab_size=300, data__sequence_length=64,
        model__shared_ffn_hidden_size=shared,
    )  # fmt: skip
    model = build_decoder(config, 300, 0).to(dtype)
    ids = torch.randint(300, (4, 64), generator=torch.Generator().manual_seed(0))
    plan = layout(num_ranks=1, ep_size=1, dtype=str(dtype).removeprefix("torch."))
    # The logits' two gradients are made in the backward pass.
    want = activation_bytes(shape_of(config, None), plan) - 2 * 4 * 300 * ids.numel()
    assert _saved_bytes(model, ids) == pytest.approx(want, rel=0.05)


def test_checkpointing_keeps_inputs_and_the_greater_of_one_layer_and_the_logits() -> None:
    """D 10, float32: inputs 2·10·4; logits 3·4·V and a norm of 10·12 + 4; the layer as without, and its gradients."""
    wide = shape(vocab_size=10_000)
    recomputed = activation_bytes(wide, layout(checkpointing=True))
    assert recomputed == 100 * (2 * 10 * 4 + 3 * 4 * 10_000 + 10 * 12 + 4)
    narrow = activation_bytes(shape(vocab_size=1), layout(checkpointing=True))
    attention = 2 * (10 * 12 + 4) + 4 * 10 * 4 + 2 * 4
    dense = attention + 4 * 30 * 4 + (3 * 30 + 10) * 4
    moe = attention + 6 * 4 * 8 + 2 * ((10 + 40) * 4 + 32) + 2 * (3 * 20 + 10) * 4
    assert narrow == 100 * (2 * 10 * 4 + max(dense, moe))


def test_the_fullest_moment() -> None:
    """2000 parameters and 8·600 in experts on one rank; ZeRO-1 in bfloat16: weights 2, masters 4, moments 8 bytes."""
    plan = layout(num_ranks=1, ep_size=1, zero_stage=1, dtype="bfloat16")
    found = memory_per_rank(shape(), plan, commits_on_touch=True)
    always = (2 + 4 + 8) * 6800
    assert found.update == 4 * 4800 < 2 * 6800 + found.activations
    assert found.buffers == 2 * 6800
    assert found.total == always + max(2 * 6800 + found.activations, 2 * 6800 * 2 + found.one_layer)
    reserved = memory_per_rank(shape(), plan, commits_on_touch=False)
    assert reserved.total - found.total == 2 * (BUCKET_ELEMENTS - 6800)
    # At stage 0 all gradients are copied to float32 for the update.
    plan_0 = layout(num_ranks=1, ep_size=1, zero_stage=0, dtype="bfloat16")
    tiny = memory_per_rank(shape(sequence_length=1, micro_batch_size=1, vocab_size=2), plan_0, commits_on_touch=True)
    assert tiny.update == (2 + 4) * 6800 and tiny.total == always + tiny.update
    later = memory_per_rank(shape(accumulation_steps=2), plan, commits_on_touch=True)
    assert later.gradients_before == 2 * 6800
    assert later.total == always + 2 * 6800 * 2 + later.activations
