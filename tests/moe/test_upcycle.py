"""A dense Hugging Face model and the same model with MoELayers of copies compute the same."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import combinations, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import dynmoe_ds as dm
from dynmoe_ds.distributed import expert_parallel_group
from dynmoe_ds.errors import ConfigError
from tests.helpers.models import deepspeed_config
from tests.helpers.spawn import run_ranks
from tests.moe.dense_models import (
    AVERAGING,
    KINDS,
    LAYERS,
    LINEARS,
    MODELS,
    PATHS,
    SIZES,
    B,
    D,
    F,
    L,
    bert,
    copied_parameters,
    distilbert,
    gpt_neox,
    gptj,
    inputs,
    layer_names,
    llama,
    make,
    modernbert,
    siglip,
    starcoder2,
    state,
    vit,
)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_upcycled_model_computes_what_the_dense_model_computed(name):
    dense = make(name)
    batch = inputs(dense)
    model = dm.upcycle(deepcopy(dense), layers="all", num_experts=3, num_slots=5, router=AVERAGING, seed=0)
    assert layer_names(model) == [PATHS[name].format(i) for i in range(LAYERS)]
    assert not model.training
    with dm.StepLedger() as ledger:
        model.train()
        model(**batch)
    assert any(1 < record.mean_k < 3 for record in ledger.records().values()), "routing must differ between tokens"
    assert {model.get_submodule(path).expert_kind for path in layer_names(model)} == {KINDS[name]}
    want, got = dense(**batch)[0], model.eval()(**batch)[0]  # logits, or the last hidden states
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_expert_is_a_copy_and_nothing_else_changes(name):
    dense = make(name)
    model = dm.upcycle(deepcopy(dense), layers=[1], num_experts=3, num_slots=5, seed=0)
    (path,) = layer_names(model)
    layer = model.get_submodule(path)
    copied = copied_parameters(dense, name, 1)
    assert set(copied) == {key for key, _ in layer.experts.named_parameters()}
    for key, value in copied.items():
        stacked = layer.experts.get_parameter(key)
        assert all(torch.equal(stacked[slot], value) for slot in layer.active.nonzero().flatten()), key
        assert not stacked[~layer.active].any()
    parent = path.rpartition(".")[0]
    gone = {f"{parent}.{linear}.{kind}" for linear in LINEARS[name] for kind in ("weight", "bias")}
    rest = {key: value for key, value in dense.state_dict().items() if key not in gone}
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{path}.")}
    assert kept.keys() == rest.keys()
    assert all(torch.equal(kept[key], value) for key, value in rest.items())


def test_bert_keeps_dropout_residual_and_norm():
    model = dm.upcycle(make("bert", hidden_dropout_prob=0.3), layers=[2], seed=0)
    output = model.bert.encoder.layer[2].output
    assert isinstance(output.dense, nn.Identity)
    assert output.dropout.p == 0.3
    x, residual = torch.randn(2, D), torch.randn(2, D)
    torch.testing.assert_close(output(x, residual), output.LayerNorm(x + residual))


def test_padding_reaches_the_layers_of_an_encoder():
    """With the engine's padding mask, real tokens get what the dense model gives them, and padding is not routed."""
    dense = make("bert")
    model = dm.upcycle(deepcopy(dense), layers="all", router=AVERAGING, seed=0)
    dm.moe.watch_padding(model)
    mask = torch.ones(B, L, dtype=torch.long)
    mask[0, 3:] = 0
    batch = {**inputs(dense), "attention_mask": mask}
    torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, rtol=1e-5, atol=1e-5)
    with dm.StepLedger() as ledger:
        model.train()(**batch)
    assert all(int(record.num_tokens) == int(mask.sum()) for record in ledger.records().values())


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("even", [0, 2]),
        ("odd", [1, 3]),
        ("all", [0, 1, 2, 3]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3]),
        ([3, 1], [1, 3]),
        ([-1], [3]),
        ((-2, 0), [0, 2]),
    ],
    ids=str,
)
def test_layers_by_word_and_by_index(layers, chosen):
    assert layer_names(dm.upcycle(make("llama"), layers=layers)) == [PATHS["llama"].format(i) for i in chosen]


@pytest.mark.parametrize(("layers", "chosen"), [("first_half", [0]), ("second_half", [1, 2])])
def test_the_middle_of_an_odd_number_of_layers_is_of_the_second_half(layers, chosen):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **SIZES | {"num_hidden_layers": 3}))
    assert layer_names(dm.upcycle(model, layers=layers)) == [PATHS["llama"].format(i) for i in chosen]


def test_the_mlp_in_the_head_of_siglip_is_no_layer():
    dense = make("siglip")
    model = dm.upcycle(deepcopy(dense), layers="all")
    assert len(layer_names(model)) == LAYERS
    head, before = model.head.mlp.fc1, dense.head.mlp.fc1
    assert isinstance(head, nn.Linear) and torch.equal(head.weight, before.weight)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_layer_s_training_mode_dtype_and_frozen_weights_are_kept(name):
    model = make(name).to(torch.bfloat16).train()
    model.model.layers[0].mlp.requires_grad_(False)
    dm.upcycle(model, layers="all", seed=0)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    layers = [model.get_submodule(name) for name in layer_names(model)]
    assert all(layer.training for layer in layers)
    for weight in ("w1", "w2", "w3"):
        assert [layer.experts.get_parameter(weight).requires_grad for layer in layers] == [False, True, True, True]


def test_seed_governs_gate_rows_and_noise_and_layers_differ():
    def weights(**options: Any) -> dict[str, Tensor]:
        return state(dm.upcycle(make("vit"), layers="all", **options))

    key, gate = PATHS["vit"].format(0) + ".experts.w1", PATHS["vit"].format(0) + ".router.weight"
    again, first, other = (weights(seed=s, noise=0.1) for s in (5, 5, 6))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(first[key], other[key]) and not torch.equal(first[gate], other[gate])
    assert not torch.equal(first[gate], first[gate.replace(".0.", ".1.")])


def test_torch_s_seed_governs_a_model_without_one():
    models = [make("vit") for _ in range(3)]
    torch.manual_seed(11)
    first, other = (dm.upcycle(model).vit.layers[0].mlp for model in models[:2])
    torch.manual_seed(11)
    again = dm.upcycle(models[2]).vit.layers[0].mlp
    assert torch.equal(again.router.weight, first.router.weight)
    assert not torch.equal(other.router.weight, first.router.weight)


@pytest.mark.parametrize("name", ["llama", "phi3", "phi", "bert"])
def test_noise_is_a_fraction_of_every_copied_tensor_s_spread(name):
    dense = make(name)
    model = dm.upcycle(deepcopy(dense), layers=[0], num_experts=32, num_slots=32, seed=3, noise=0.25)
    layer, sources = model.get_submodule(PATHS[name].format(0)), copied_parameters(dense, name, 0)
    assert sources.keys() == {key for key, _ in layer.experts.named_parameters()}
    first = []
    for key, source in sources.items():
        noise = layer.experts.get_parameter(key).detach() - source
        # The spread of n normal numbers is itself spread by 1 / sqrt(2n): 0.6% of a weight's and 3% of a bias's here.
        tolerance = 4 / (2 * noise.numel()) ** 0.5
        spread = float(noise.square().mean().sqrt())
        assert spread == pytest.approx(0.25 * float(source.std(correction=0)), rel=tolerance), key
        assert len({float(of_expert.flatten()[0]) for of_expert in noise}) == 32, "each expert has noise of its own"
        first.append(noise.flatten()[:8] / spread)
    # From one seed these would agree but for what is estimated in `spread`.
    assert not any(torch.allclose(a, b, rtol=0.2) for a, b in combinations(first, 2)), "noise of one seed"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_finer_experts_that_all_have_the_same_weight_compute_what_the_dense_model_computed(name):
    dense = make(name).double()
    router = dm.TopKConfig(k=4)  # of 4, with the weights of a softmax
    model = dm.upcycle(deepcopy(dense), layers="all", num_experts=4, num_slots=6, router=router, seed=0, parts=2)
    for path in layer_names(model):
        layer = model.get_submodule(path)
        layer.router.weight.zero_()
        assert layer.ffn_hidden_size == F // 2
        first, second, *again = (layer.experts.w1[slot] for slot in layer.placement.slots_by_id.values())
        assert not torch.equal(first, second) and all(map(torch.equal, again, (first, second)))
    batch = inputs(dense)
    torch.testing.assert_close(model(**batch)[0], dense(**batch)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu", "gelu"),
        ("quick_gelu", "quick_gelu"),
    ],
)
def test_the_activation_decides_the_kind_of_expert(activation, kind):
    for model in (vit(hidden_act=activation), bert(hidden_act=activation), gpt_neox(hidden_act=activation)):
        assert model.get_submodule(layer_names(dm.upcycle(model, layers=[1]))[0]).expert_kind == kind


@pytest.mark.parametrize(
    ("activation", "kind"),
    [("gelu", "geglu"), ("gelu_new", "geglu_tanh"), ("gelu_fast", "geglu_tanh"), ("silu", "swiglu")],
)
def test_the_activation_decides_the_kind_of_gated_expert(activation, kind):
    for model in (llama(hidden_act=activation), modernbert(hidden_activation=activation)):
        assert model.get_submodule(layer_names(dm.upcycle(model, layers=[1]))[0]).expert_kind == kind


REFUSED = {
    "relu": (
        lambda: bert(hidden_act="relu"),
        {},
        r"layer\.0 computes something else than any.*quick_gelu.*ReLU",
    ),
    "gated relu": (lambda: llama(hidden_act="relu"), {}, "something else than any expert.*swiglu, .*has ReLU"),
    "parts of experts": (vit, {"num_experts": 4, "parts": 3}, r"parts is 3 but .* divide num_experts \(4\)"),
    "parts of units": (vit, {"num_experts": 7, "parts": 7}, r"divide the hidden units of vit\.layers\.0\.mlp, 24"),
    "bias": (lambda: llama(mlp_bias=True), {}, "mlp has biases in down_proj, gate_proj, up_proj, unlike a swiglu"),
    "chunks": (lambda: bert(chunk_size_feed_forward=2), {}, "Set chunk_size_feed_forward to 0"),
    "no FFN": (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        {},
        "Sequential has no .* of a known form .*; gate_up_proj, down_proj; .* Found: no numbered",
    ),
    "GPT-2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2)),
        {},
        r"GPT2LMHeadModel has no feed-forward network of a known form in numbered layers\..*\. Found: "
        r"transformer\.h\.\*\.mlp \(GPT2MLP\) with c_fc \(Conv1D\), c_proj \(Conv1D\), act \(\w+\), "
        r"dropout \(Dropout\)\.$",
    ),
    "silu of two layers": (
        lambda: gpt_neox(hidden_act="silu"),
        {},
        r"layers\.0\.mlp computes something else than any.*quick_gelu.*SiLU",
    ),
    "no bias": (lambda: starcoder2(use_bias=False), {}, r"mlp lacks biases in c_fc, c_proj, unlike a gelu expert"),
    "fused bias": (lambda: modernbert(mlp_bias=True), {}, r"mlp has biases in Wi, Wo, unlike a swiglu expert"),
    "dropout function": (lambda: starcoder2(residual_dropout=0.1), {}, "mlp has dropout .*Set its probability to 0"),
    "dropout module": (lambda: gptj(resid_pdrop=0.1), {}, r"h\.0\.mlp has dropout \(NewGELUActivation, Dropout\), and"),
    "dropout of DistilBERT": (lambda: distilbert(dropout=0.1), {}, "ffn has dropout .*Set its probability to 0"),
    "dropout of gates": (lambda: modernbert(mlp_dropout=0.1), {}, "mlp has dropout .*Set its probability to 0"),
    "BLOOM": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=D, n_layer=2, n_head=2)),
        {},
        r"transformer\.h\.0\.mlp takes residual beside tokens",
    ),
    "Falcon": (
        lambda: FalconForCausalLM(FalconConfig(vocab_size=11, **SIZES)),
        {},
        r"Found: transformer\.h\.\*\.mlp \(FalconMLP\) with dense_h_to_4h \(FalconLinear\)",
    ),
    "linears that do not fit": (
        lambda: nn.ModuleDict(
            {"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(D, 2 * F), "fc2": nn.Linear(F, D)})])}
        ),
        {},
        r"Found: layers\.\* \(ModuleDict\) with fc1",
    ),
    "OPT": (
        lambda: OPTForCausalLM(
            OPTConfig(vocab_size=11, hidden_size=D, ffn_dim=F, num_hidden_layers=1, num_attention_heads=2)
        ),
        {},
        r"Found: model\.decoder\.layers\.\* \(OPTDecoderLayer\) with .*fc1 \(Linear\), fc2 \(Linear\)",
    ),
    "twice": (lambda: dm.upcycle(vit(), layers=[0]), {"layers": [1]}, r"has MoELayers already: vit\.layers\.0\.mlp"),
    "several places": (
        lambda: nn.ModuleDict({"eye": siglip(), "other": vit()}),
        {},
        r"several places: eye\.encoder\.layers\.\*\.mlp, other\.vit\.layers\.\*\.mlp\. Upcycle the part",
    ),
    "out of range": (vit, {"layers": [1, 4, -5]}, r"layers names 4, -5, but .* are 0, 1, 2, 3 \(or -1 for 3"),
    "no layer": (vit, {"layers": []}, "is no layer"),
    "a layer twice": (vit, {"layers": [3, -1]}, "is a layer twice"),
    "a word": (vit, {"layers": "last"}, "layers is 'last'. Use all, even, odd, first_half, second_half or a list"),
    "noise": (vit, {"noise": -0.1}, "noise is -0.1 but must not be negative"),
    "sizes": (vit, {"num_experts": 9}, "num_experts is 9 but must be between 1 and num_slots"),
    "ranks": (vit, {"ep_size": 2}, "ep_size is 2 but there is one data-parallel rank"),
    "router": (vit, {"router": "nobody"}, "There is no router called 'nobody'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_upcycled_is_refused_and_left_as_it_was(case):
    build, options, message = REFUSED[case]
    torch.manual_seed(0)
    model = build()
    before, modules = state(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=message):
        dm.upcycle(model, **options)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_inside_a_feed_forward_network_is_refused():
    class MLPWithDropout(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.drop, self.fc2 = nn.Linear(D, F), nn.GELU(), nn.Dropout(0.1), nn.Linear(F, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.drop(self.act(self.fc1(x))))

    model = nn.Module()
    model.layers = nn.ModuleList([MLPWithDropout()]).eval()
    with pytest.raises(ConfigError, match="GELU, Dropout"):
        dm.upcycle(model)
    model.layers[0].drop.p = 0.0
    assert layer_names(dm.upcycle(model)) == ["layers.0"]


def _states(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """The upcycled model's state with the experts of all ranks of its pool, by how many share one."""
    states = []
    for ep_size in (1, 2, 4):
        model = dm.upcycle(make("bert"), layers="odd", num_experts=3, num_slots=4, ep_size=ep_size, seed=9, noise=0.1)
        whole = state(model)
        for name, value in whole.items():
            if ".experts." in name and ep_size > 1:
                parts = [torch.empty_like(value) for _ in range(ep_size)]
                dist.all_gather(parts, value, group=expert_parallel_group(ep_size))
                whole[name] = torch.cat(parts)
        states.append(whole)
    return states


def test_all_layouts_start_from_the_same_model():
    for alone, *others in run_ranks(_states, 4):
        for shared in others:
            assert alone.keys() == shared.keys()
            assert all(torch.equal(shared[name], value) for name, value in alone.items())


# One expert with softmax weights has weight 1 and no gradient through it: exactly the dense FFN, in training too.
ONE_EXPERT = {
    "top_any": dm.TopAnyConfig(weighting="softmax", training_fallback="top_1", diversity_weight=0, simplicity_weight=0),
    "top_k": dm.TopKConfig(k=1),  # the dense peer of the demo
}
BATCHES = 3
TRAINED = ("bert", "vit")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _labelled(model: nn.Module, step: int) -> dict[str, Tensor]:
    labels = torch.randint(3, (B,), generator=torch.Generator().manual_seed(step))
    return {name: value.roll(step, 0) for name, value in inputs(model).items()} | {"labels": labels}


def _losses(model: nn.Module, train_step: Callable[[dict[str, Tensor]], Tensor]) -> list[float]:
    return [train_step(_labelled(model, step)).item() for step in range(BATCHES)]


def _trained(rank: int, world_size: int) -> dict[tuple[str, str, int], list[float]]:
    """Losses of the upcycled models under the engine."""
    losses = {}
    for name, router, stage in product(TRAINED, ONE_EXPERT, (0, 2)):
        model = make(name, **NO_DROPOUT).train()
        dm.upcycle(model, layers="all", num_experts=1, num_slots=2, router=ONE_EXPERT[router], seed=0)
        engine = dm.initialize(model=model, config=deepspeed_config(stage, kind="SGD", lr=0.05))

        def train_step(batch: dict[str, Tensor], engine: Any = engine) -> Tensor:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            return loss.detach()

        losses[name, router, stage] = _losses(engine.module, train_step)
    return losses


def test_a_model_of_one_expert_trains_like_the_dense_model():
    (got,) = run_ranks(_trained, 1)
    for name in TRAINED:
        model = make(name, **NO_DROPOUT).train()
        untrained = model(**_labelled(model, 1)).loss.item()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def train_step(batch: dict[str, Tensor], model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        want = _losses(model, train_step)
        assert abs(want[1] - untrained) > 1e-3, "a step must show in the next loss"
        for router, stage in product(ONE_EXPERT, (0, 2)):
            assert got[name, router, stage] == pytest.approx(want, rel=1e-5), (name, router, stage)
