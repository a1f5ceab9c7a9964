from dataclasses import replace

import pytest
import torch
from tests.helpers.run_config import small_run
from torch import nn

from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.models import build_decoder, count_parameters, parameter_groups
from dynmoe_ds.moe import MoELayer

VOCAB_SIZE, HIDDEN, DENSE, EXPERT, SLOTS = 50, 16, 24, 8, 6


def run_config(*, seed=1, checkpointing="none", expert="swiglu", num_layers=4, **model) -> RunConfig:
    return small_run(
        seed=seed,
        model__hidden_size=HIDDEN,
        model__num_layers=num_layers,
        model__dense_ffn_hidden_size=DENSE,
        model__expert_ffn_hidden_size=EXPERT,
        model__num_slots=SLOTS,
        expert__kind=expert,
        parallel__activation_checkpointing=checkpointing,
        **{f"model__{key}": value for key, value in model.items()},
    )


def _decoder(**changes):
    return build_decoder(run_config(**changes), VOCAB_SIZE, eos_token_id=0)


def _moe_indices(model) -> list[int]:
    return [index for index, layer in enumerate(model.model.layers) if isinstance(layer.mlp, MoELayer)]


def _loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(4))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("moe_every", "expected"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_every_nth_mlp_is_a_moe_layer(moe_every, expected):
    model = _decoder(moe_every=moe_every)
    assert _moe_indices(model) == expected
    assert "model.layers.3.mlp" in dict(model.named_modules())


@pytest.mark.parametrize(("moe_every", "first", "expected"), [(2, 0, [0, 2]), (3, 0, [0, 3]), (1, 2, [2, 3])])
def test_moe_layers_may_begin_elsewhere(moe_every, first, expected):
    assert _moe_indices(_decoder(moe_every=moe_every, moe_first=first)) == expected


def test_the_output_layer_may_have_weights_of_its_own():
    model = _decoder(tie_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    tied = count_parameters(_decoder(), ep_size=1)
    assert count_parameters(model, ep_size=1).in_slots == tied.in_slots + VOCAB_SIZE * HIDDEN


def test_a_seed_gives_one_model_layers_differ_and_the_global_state_stays():
    before = torch.get_rng_state()
    first, second, other = _decoder(), _decoder(), _decoder(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    for (name, one), two, different in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
        if "norm" not in name and "threshold" not in name:
            assert not torch.equal(one, different), name
    one, three = (first.model.layers[index].mlp.experts.w1 for index in (1, 3))
    assert not torch.equal(one, three)


def test_a_shared_expert_adds_its_output_for_every_token():
    model, without = _decoder(shared_ffn_hidden_size=12), _decoder()
    x = torch.randn(5, HIDDEN)
    layers = [(one.mlp, other.mlp) for one, other in zip(model.model.layers, without.model.layers, strict=True)]
    for layer, other in layers[1::2]:
        gate, up, down = (layer.shared.get_submodule(f"{name}_proj").weight for name in ("gate", "up", "down"))
        assert gate.shape == (12, HIDDEN) and gate.std().item() == pytest.approx(0.02, rel=0.2)
        beside = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        assert beside.abs().max() > 0
        torch.testing.assert_close(layer(x), other(x) + beside)
    assert not torch.equal(layers[1][0].shared.up_proj.weight, layers[3][0].shared.up_proj.weight)
    assert without.model.layers[1].mlp.shared is None and not isinstance(layers[0][0], MoELayer)


def test_expert_weights_are_on_the_scale_of_the_dense_ones():
    """Llama's standard deviation is 0.02; a far larger one would let the experts drown the residual stream."""
    model = _decoder()
    live = model.model.layers[1].mlp.active
    output = model.model.layers[1].mlp(torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(0)))
    assert live.sum() == 4
    assert 0 < output.std() < 1


def test_settings_that_training_relies_on():
    model = _decoder()
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache is False
    assert model.config.eos_token_id == 0


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_activation_checkpointing_changes_no_number(kind):
    plain, checkpointed = _decoder(), _decoder(checkpointing=kind)
    calls = []
    checkpointed.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = _loss_and_gradients(plain)
    same_loss, same_gradients = _loss_and_gradients(checkpointed)
    assert len(calls) == 2, "the layer must run again in the backward pass"
    assert torch.equal(loss, same_loss)
    for name, gradient in gradients.items():
        assert (gradient is None) == (same_gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, same_gradients[name], rtol=0, atol=1e-7, msg=name)


def test_deepspeed_checkpointing_is_deepspeed_s():
    functions = {layer._gradient_checkpointing_func for layer in _decoder(checkpointing="deepspeed").model.layers}
    assert [function.__module__ for function in functions] == ["dynmoe_ds.engine.activation_checkpointing"]


def test_rotary_frequencies_stay_exact_in_bfloat16():
    model = _decoder()
    exact = model.model.rotary_emb.inv_freq.clone()
    rotary = model.bfloat16().model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, exact)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not torch.equal(exact, exact.bfloat16().float()), "the example must have frequencies that rounding changes"


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
def test_parameter_groups_hold_every_parameter_once(expert):
    model = _decoder(expert=expert)
    groups = {group["name"]: group for group in parameter_groups(model, 0.1)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"decay": 0.1, "no_decay": 0.0}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    undecayed = {names[id(p)] for p in groups["no_decay"]["params"]}
    expected = {"model.norm.weight"}
    for index in range(4):
        layer = f"model.layers.{index}"
        expected |= {f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"}
        if index in (1, 3):
            expected.add(f"{layer}.mlp.router.threshold")
            expected |= {f"{layer}.mlp.experts.{b}" for b in ("b1", "b2")} if expert == "gelu" else set()
    assert undecayed == expected


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out():
    model = _decoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    groups = parameter_groups(model, 0.1)
    assert [group["name"] for group in groups] == ["no_decay"]
    assert len(groups[0]["params"]) == 9


def test_parameter_counts_by_hand():
    """Two MoE layers of 6 slots, 4 of them live; one router row has HIDDEN gate values and a threshold."""
    per_expert, per_row = 3 * HIDDEN * EXPERT, HIDDEN + 1
    dense = VOCAB_SIZE * HIDDEN + HIDDEN + 4 * (4 * HIDDEN**2 + 2 * HIDDEN) + 2 * 3 * HIDDEN * DENSE
    count = count_parameters(_decoder(), ep_size=1)
    assert count.in_slots == dense + 2 * 6 * (per_expert + per_row)
    assert count.live == dense + 2 * 4 * (per_expert + per_row)
    mean_k = {"model.layers.1.mlp": 1.5, "model.layers.3.mlp": 2.0}
    assert count.active_per_token(mean_k) == dense + 2 * 4 * per_row + 3.5 * per_expert
    now = {"model.layers.1.mlp": 6, "model.layers.3.mlp": 3}
    assert count.active_per_token(mean_k, now) == dense + 9 * per_row + 3.5 * per_expert


def test_parameter_counts_do_not_depend_on_the_layout(monkeypatch):
    whole = count_parameters(_decoder(), ep_size=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    config = run_config()
    halved = replace(config, parallel=replace(config.parallel, ep_size=2, num_ranks=2))
    half = build_decoder(halved, VOCAB_SIZE, eos_token_id=0)
    assert half.model.layers[1].mlp.experts.w1.shape[0] == 3
    assert count_parameters(half, ep_size=2) == whole
    # Slots 3 to 5 of the whole model, and everything that is not an expert.
    for name, parameter in _decoder().named_parameters():
        mine = half.get_parameter(name)
        assert torch.equal(mine, parameter[3:] if ".experts." in name else parameter), name
