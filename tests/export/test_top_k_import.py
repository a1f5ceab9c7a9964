"""Mixtral, Qwen2-MoE and Qwen3-MoE as models with `MoELayer`s: what they computed before, and growth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError, DivergenceError
from dynmoe_ds.moe import watch_padding
from tests.helpers.models import deepspeed_config, gathered
from tests.helpers.reference import assert_near
from tests.helpers.spawn import run_ranks

VOCAB, D = 40, 16
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.4,  # so that experts and router matter to the logits
    "pad_token_id": 0,
}
QWEN: dict[str, Any] = COMMON | {"num_experts": 5, "moe_intermediate_size": 24, "intermediate_size": 20}


def mixtral(**values: Any) -> Any:
    torch.manual_seed(0)
    config = COMMON | {"num_local_experts": 5, "intermediate_size": 24} | values
    return MixtralForCausalLM(MixtralConfig(**config)).eval()


def qwen2(**values: Any) -> Any:
    torch.manual_seed(1)
    config = QWEN | {"shared_expert_intermediate_size": 12, "decoder_sparse_step": 1} | values
    return with_router(Qwen2MoeForCausalLM(Qwen2MoeConfig(**config)))


def qwen3(**values: Any) -> Any:
    torch.manual_seed(2)
    return with_router(Qwen3MoeForCausalLM(Qwen3MoeConfig(**(QWEN | {"head_dim": 8} | values))))


def with_router(model: Any) -> Any:
    """Gate rows that are not all alike, whatever the class starts them with."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


MODELS = {
    "mixtral": mixtral,
    "mixtral with gelu": lambda: mixtral(hidden_act="gelu_pytorch_tanh"),
    "qwen2": lambda: qwen2(norm_topk_prob=False),
    "qwen2 renormalized": lambda: qwen2(norm_topk_prob=True),
    "qwen2 with a dense layer": lambda: qwen2(mlp_only_layers=[0]),
    "qwen2 with one expert per token": lambda: qwen2(num_experts_per_tok=1, norm_topk_prob=False),
    "qwen3": lambda: qwen3(norm_topk_prob=True),
    "qwen3 not renormalized": lambda: qwen3(norm_topk_prob=False),
}


def batch() -> tuple[Tensor, Tensor]:
    """Ids [3, 9] and a mask that pads the second sequence on the left and the third on the right."""
    ids = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, 6:] = 0
    return ids * mask, mask


def layers_of(model: Any) -> list[dm.MoELayer]:
    return [module for module in model.modules() if isinstance(module, dm.MoELayer)]


@pytest.mark.parametrize("num_slots", [None, 8])
@pytest.mark.parametrize("name", MODELS)
def test_the_imported_model_gives_the_logits_of_the_original(name: str, num_slots: int | None) -> None:
    original = MODELS[name]()
    model = dm.import_top_k_model(copy.deepcopy(original), num_slots=num_slots)
    layers = layers_of(model)
    assert len(layers) == (1 if "dense" in name else 2)
    assert all(layer.num_slots == (num_slots or 5) and layer.placement.live_ids == (0, 1, 2, 3, 4) for layer in layers)
    assert not any("SparseMoe" in type(module).__name__ for module in model.modules())
    ids, mask = batch()
    with torch.no_grad():
        want, got = original(ids).logits, model(ids).logits
        assert_near(got, want, what="without padding")
        real = mask.bool()
        want = original(ids, attention_mask=mask).logits[real]
        assert_near(model(ids, attention_mask=mask).logits[real], want, what="with padding")
        watch_padding(model)
        assert_near(model(ids, attention_mask=mask).logits[real], want, what="with padding that is not routed")


@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_the_gradients_are_those_of_the_original(name: str) -> None:
    original = MODELS[name]()
    model = dm.import_top_k_model(copy.deepcopy(original), num_slots=8)
    ids, _ = batch()
    for trained in (original, model):
        trained.train()(ids, labels=ids).loss.backward()
    for got, want in zip(layers_of(model), (layer.mlp for layer in original.model.layers), strict=True):
        slots = list(got.placement.slots_by_id.values())
        both = want.experts.gate_up_proj.grad
        assert_near(got.experts.w1.grad[slots], both[:, :24], what="w1")
        assert_near(got.experts.w3.grad[slots], both[:, 24:], what="w3")
        assert_near(got.experts.w2.grad[slots], want.experts.down_proj.grad, what="w2")
        assert_near(got.router.weight.grad[slots], want.gate.weight.grad, what="gate")
        if name == "qwen2":
            assert_near(got.shared.gate.weight.grad, want.shared_expert_gate.weight.grad, what="gate of the shared")
    assert_near(model.model.embed_tokens.weight.grad, original.model.embed_tokens.weight.grad, what="embedding")


def test_dtype_mode_and_frozen_parameters_stay() -> None:
    model = mixtral().to(torch.bfloat16).train()
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    model.model.layers[1].mlp.gate.weight.requires_grad_(False)
    assert dm.import_top_k_model(model) is model
    first, second = layers_of(model)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert first.training and second.training
    assert [first.experts.w2.requires_grad, first.experts.w1.requires_grad, first.router.weight.requires_grad] == [
        False,
        True,
        True,
    ]
    assert not second.router.weight.requires_grad


@pytest.mark.parametrize(
    ("build", "sizes", "message"),
    [
        (
            lambda: LlamaForCausalLM(LlamaConfig(**{**COMMON, "intermediate_size": 8})),
            {},
            "LlamaForCausalLM has no sparse block of a known class. Known are MixtralSparseMoeBlock, "
            "Qwen2MoeSparseMoeBlock, Qwen3MoeSparseMoeBlock of transformers",
        ),
        (
            lambda: mixtral(hidden_act="relu"),
            {},
            "model.layers.0.mlp has the activation relu, but experts have silu, gelu, gelu_pytorch_tanh only.",
        ),
        (
            lambda: mixtral(num_experts_per_tok=1),
            {},
            "model.layers.1.mlp takes one expert per token with the constant weight 1, but top_k gives a single choice "
            "its probability as weight. Set num_experts_per_tok to 2 or more.",
        ),
        (
            lambda: mixtral(router_jitter_noise=0.1),
            {},
            "model.layers.0.mlp multiplies its input in training by noise of router_jitter_noise 0.1, which top_k does "
            "not. Set the block's jitter_noise to 0.",
        ),
        (
            lambda: mixtral(output_router_logits=True),
            {},
            "config.output_router_logits is True, but a MoELayer gives no router logits to the model's own auxiliary "
            "loss. Set it to False",
        ),
        (mixtral, {"num_slots": 4}, "num_slots is 4 but model.layers.0.mlp has 5 experts. Use 5 or more."),
        (mixtral, {"num_slots": 7, "ep_size": 2}, "num_slots is 7 but must be a multiple of ep_size (2)"),
        (mixtral, {"ep_size": 0}, "ep_size is 0 but must be at least 1."),
        (mixtral, {"ep_size": 2}, "ep_size is 2 but there is one data-parallel rank."),
    ],
)
def test_what_cannot_be_imported_is_refused_and_nothing_changes(build: Any, sizes: Any, message: str) -> None:
    model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError) as raised:
        dm.import_top_k_model(model, **sizes)
    assert message in str(raised.value)
    assert [type(module) for module in model.modules()] == before


GROWING = {
    "mixtral": lambda: mixtral(num_local_experts=3),
    "qwen2": lambda: qwen2(num_experts=3),
    "qwen3": lambda: qwen3(num_experts=3),
}


NUM_STEPS = 4
LAYOUTS = {"EP 2": (2, 2), "EP 2 x EDP 2": (4, 2)}


def row(step: int, index: int) -> dict[str, Tensor]:
    """One of a step's four sequences [1, 9], two of them padded on the left.

    Each is alone in its micro step, so that nothing depends on how many ranks share them out: neither the mean of a
    batch, nor the load-balance loss, which is one of a rank's own tokens.
    """
    ids = torch.randint(1, VOCAB, (1, 9), generator=torch.Generator().manual_seed(10 * step + index))
    mask = torch.ones_like(ids)
    mask[0, : (0, 2, 5, 0)[index]] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each of `GROWING`, as transformers writes it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, build in GROWING.items():
        build().save_pretrained(folder / name)
    return folder


def growing(rank: int, world_size: int, folder: str, ep_size: int) -> dict[str, Any]:
    """By model, loaded from its folder: what there is to compare of steps after the second of which all experts split.

    Plain SGD without decay or momentum, so that only what has a gradient moves.
    """
    found = {}
    for name in GROWING:
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", local_files_only=True)
        dm.import_top_k_model(model, num_slots=6, ep_size=ep_size)
        num_micro = 4 // world_size
        config = deepspeed_config(2, kind="SGD", lr=0.1, accumulate=num_micro)
        adaptation = dm.AdaptationConfig(every_steps=2, window_steps=1, rule="split_all", last_growth_step=2)
        engine = dm.initialize(model=model, config=config, adaptation=adaptation)
        engine.train()
        losses, pools, weights = [], [], []
        for step in range(NUM_STEPS):
            pools.append({path: placement.live_ids for path, placement in engine.placements().items()})
            weights.append(gathered(engine))
            total = torch.zeros(())
            for micro in range(num_micro):
                loss = engine(**row(step, micro * world_size + rank)).loss
                engine.backward(loss)
                engine.step()
                total += loss.detach()
            dist.all_reduce(total)
            losses.append(total.item() / 4)
        changes = [event.to_dict()["layers"] for event in engine.take_events()]
        born = [(path, new["expert_id"], new["parent_id"])
                for layers in changes for path, change in layers.items() for new in change["grown"]]  # fmt: skip
        found[name] = {"losses": losses, "pools": pools, "born": born, "weights": [*weights, gathered(engine)]}
    return found


@pytest.fixture(scope="module")
def grown_on_one_rank(checkpoints: Path) -> dict[str, Any]:
    return run_ranks(growing, 1, f"{checkpoints}", 1)[0]


@pytest.mark.parametrize("name", GROWING)
def test_a_saved_checkpoint_grows(name: str, checkpoints: Path, grown_on_one_rank: dict[str, Any]) -> None:
    original = AutoModelForCausalLM.from_pretrained(checkpoints / name, local_files_only=True)
    with torch.no_grad():
        want = sum(original(**row(0, index)).loss.item() for index in range(4)) / 4
    found = grown_on_one_rank[name]
    assert found["losses"][0] == pytest.approx(want, rel=1e-5)
    assert all(0 < loss < 10 for loss in found["losses"])
    for path in ("model.layers.0.mlp", "model.layers.1.mlp"):
        assert [pool[path] for pool in found["pools"]] == [(0, 1, 2)] * 2 + [(0, 1, 2, 3, 4, 5)] * 2
        before, born, stepped = found["weights"][1:4]
        new = {id_: parent for where, id_, parent in found["born"] if where == path}
        assert sorted(new) == [3, 4, 5] and sorted(new.values()) == [0, 1, 2]
        for id_ in new:
            parts = [f"{path}.{part}[{id_}]" for part in ("router.weight", "experts.w1", "experts.w2", "experts.w3")]
            for part in parts:
                assert part not in before and born[part].any()
                assert not torch.equal(stepped[part], born[part]), f"{part} has no gradient in its first step"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_checkpoints_grow_on_ranks_as_on_one(
    layout: str, checkpoints: Path, grown_on_one_rank: dict[str, Any]
) -> None:
    world_size, ep_size = LAYOUTS[layout]
    ranks = run_ranks(growing, world_size, f"{checkpoints}", ep_size, timeout_s=120)
    for name, want in grown_on_one_rank.items():
        for found in (rank[name] for rank in ranks):
            assert found["born"] == want["born"] and found["pools"] == want["pools"], name
            assert found["losses"] == pytest.approx(want["losses"], abs=2e-5), name
            for step, (weights, of_one) in enumerate(zip(found["weights"], want["weights"], strict=True)):
                assert weights.keys() == of_one.keys(), (name, step)
                for part, weight in of_one.items():
                    error = (weights[part] - weight).abs().max().item()
                    assert error <= 2e-5, (name, step, part, error)


def on_two_ranks(rank: int, world_size: int) -> tuple[float, str]:
    """The difference of the logits from the original's with experts on two ranks, and what a bad rank's error gives."""
    original = mixtral(num_local_experts=4)
    model = dm.import_top_k_model(copy.deepcopy(original), num_slots=6, ep_size=2)
    assert layers_of(model)[0].experts.w1.shape[0] == 3
    ids, mask = batch()
    with torch.no_grad():
        want = original(ids, attention_mask=mask).logits[mask.bool()]
        difference = (model(ids, attention_mask=mask).logits[mask.bool()] - want).abs().max()
    try:
        dm.import_top_k_model(mixtral(hidden_act="relu" if rank else "silu"), num_slots=6, ep_size=2)
        message = ""
    except (ConfigError, DivergenceError) as error:
        message = f"{type(error).__name__}: {error}"
    return float(difference / want.abs().max()), message


def test_experts_are_shared_by_ranks_and_one_ranks_error_is_everyones() -> None:
    (first, message), (second, own) = run_ranks(on_two_ranks, 2)
    assert first < 1e-5 and second < 1e-5
    assert message.startswith("DivergenceError") and "rank 1: ConfigError" in message and "activation relu" in message
    assert own.startswith("ConfigError")


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_the_imported_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = dm.import_top_k_model(MODELS[name](), num_slots=8)
    dm.save_model(model, tmp_path / "model")
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        assert torch.equal(dm.load_model(tmp_path / "model", num_slots=8)(ids).logits, model(ids).logits)
