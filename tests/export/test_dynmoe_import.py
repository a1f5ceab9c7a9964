"""Checkpoints in the layout of DynMoE's authors, written by the test itself, against their formulas in plain loops."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

import dynmoe_ds as dm
from dynmoe_ds.errors import CheckpointError, ConfigError, DivergenceError
from tests.helpers.dynmoe_layout import (
    MASKS,
    SIZES,
    D,
    E,
    F,
    Hooked,
    authors_layer,
    checkpoint,
    expert,
    gate,
    moe,
    phi,
    qwen2,
    stablelm,
    write_weights,
)
from tests.helpers.reference import assert_near
from tests.helpers.spawn import run_ranks

BUILD: dict[str, Callable[..., Any]] = {"stablelm": stablelm, "qwen2": qwen2, "phi": phi}


@pytest.fixture(params=BUILD)
def build(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return BUILD[request.param]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_every_layer_computes_the_authors_formula(build: Callable[..., Any], training: bool) -> None:
    tensors = checkpoint(build)
    dense = build()
    model = dm.import_dynmoe_checkpoint(copy.deepcopy(dense), tensors, num_slots=6).double().train(training)
    assert moe(model).keys() == MASKS.keys()
    x = torch.randn(60, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for index, layer in moe(model).items():
        with torch.no_grad():
            want = authors_layer(tensors, index, dense.model.layers[index].mlp, x, training)
            routing = layer.router(x, layer.active, None)
            got = layer(x)
        # All cases occur: several experts, one, and none, where in evaluation the score decides against the margin.
        assert routing.unrouted.any() and (routing.mask.sum(1) > 1).any()
        assert bool((want == 0).all(1).any()) == training
        # Thresholds and temperature went through float32.
        assert_near(got, want, torch.float32, f"layer {index}")


def test_the_fallback_is_by_score_where_the_margin_says_otherwise() -> None:
    tensors = checkpoint(stablelm)
    model = dm.import_dynmoe_checkpoint(stablelm(), tensors).eval()
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(9))
    layer = moe(model)[0]
    by_score = layer.router(x, layer.active, None)
    layer.router.config = dm.TopAnyConfig()
    by_margin = layer.router(x, layer.active, None)
    assert (by_score.mask != by_margin.mask).any(1)[by_score.unrouted].any()


def test_experts_keep_their_indices_and_masked_ones_are_absent(build: Callable[..., Any]) -> None:
    tensors = checkpoint(build)
    for index in (0, 2):  # masked in layer 2: nobody needs their weights
        for name in [name for name in tensors if name.startswith(expert(2, index))]:
            if index == 2:
                del tensors[name]
            else:
                tensors[name] = torch.full_like(tensors[name], torch.nan)
    model = dm.import_dynmoe_checkpoint(build(), tensors)
    layers = moe(model)
    assert layers[0].placement.expert_ids == (0, 2, 3) and layers[2].placement.expert_ids == (1, 3)
    assert [layer.placement.next_id for layer in layers.values()] == [E, E]
    for index, layer in layers.items():
        for id_, slot in layer.placement.slots_by_id.items():
            assert torch.equal(layer.router.weight[slot], tensors[gate(index) + "sim_matrix"][:, id_])
            assert layer.router.threshold[slot] == tensors[gate(index) + "gates"][id_]
        assert all(bool(parameter.isfinite().all()) for parameter in layer.parameters())
    assert layers[0].router.config == dm.TopAnyConfig.authors_code()
    assert layers[2].router.config.temperature == pytest.approx(math.exp(1.5))


def test_the_temperature_is_at_most_100() -> None:
    tensors = checkpoint(stablelm) | {gate(0) + "temperature": torch.tensor([9.0])}
    assert moe(dm.import_dynmoe_checkpoint(stablelm(), tensors))[0].router.config.temperature == pytest.approx(100)


def test_a_pool_with_free_slots_spreads_the_experts() -> None:
    model = dm.import_dynmoe_checkpoint(stablelm(), checkpoint(stablelm), num_slots=8)
    assert moe(model)[0].placement.expert_ids == (0, None, 2, None, None, 3, None, None)


def logits(model: Any) -> Tensor:
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids).logits


def test_the_whole_model_gives_the_logits_of_the_formula_in_the_dense_one(build: Callable[..., Any]) -> None:
    tensors = checkpoint(build)
    reference = build()
    absent = reference.load_state_dict(tensors, strict=False).missing_keys
    assert all(".mlp." in name or name == "lm_head.weight" for name in absent)
    for index in MASKS:
        layer = reference.model.layers[index]
        layer.mlp = Hooked(tensors, index, layer.mlp)
    imported = dm.import_dynmoe_checkpoint(build(), tensors)
    assert_near(logits(imported), logits(reference))
    assert_near(logits(dm.import_dynmoe_checkpoint(build(), tensors, num_slots=9)), logits(reference))


def test_dtype_mode_and_frozen_parameters_stay() -> None:
    model = stablelm().to(torch.bfloat16).train()
    model.model.layers[0].mlp.up_proj.requires_grad_(False)
    assert dm.import_dynmoe_checkpoint(model, checkpoint(stablelm)) is model
    layer = moe(model)[0]
    assert layer.training and all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert [layer.experts.w1.requires_grad, layer.experts.w3.requires_grad] == [True, False]


# --- folders ---


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(("shards", "indexed"), [(1, False), (2, False), (2, True)])
def test_folders_give_the_same_model(kind: str, shards: int, indexed: bool, tmp_path: Path) -> None:
    tensors = checkpoint(stablelm)
    write_weights(tmp_path, tensors, kind, shards, indexed)
    (tmp_path / "training_args.bin").write_bytes(b"no tensors")
    want, got = (dm.import_dynmoe_checkpoint(stablelm(), source).state_dict() for source in (tensors, str(tmp_path)))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def with_llava(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {
        "model.mm_projector.image_spatial_proj.0.weight": torch.ones(2),
        "model.image_tower.image_tower.vision_model.post_layernorm.weight": torch.ones(2),
    }


def test_vision_parts_are_left_out_and_names_are_changed_when_asked() -> None:
    tensors = checkpoint(stablelm)
    longer = {
        ("text." + name.removeprefix("model.") if name.startswith("model.") else name): value
        for name, value in tensors.items()
    }
    longer["text.mm_projector.weight"] = torch.ones(1)
    longer["text.last.weight"] = longer.pop("text.norm.weight")
    want = dm.import_dynmoe_checkpoint(stablelm(), tensors).state_dict()
    for source, options in (
        (with_llava(tensors), {"ignored": ["model.mm_projector.", "model.image_tower."]}),
        (longer, {"renamed": {"text.": "model.", "text.last.": "model.norm."}, "ignored": ["text.mm_projector."]}),
    ):
        got = dm.import_dynmoe_checkpoint(stablelm(), source, **options).state_dict()
        assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_prefix_of_no_name_and_two_names_in_one_are_refused() -> None:
    tensors = checkpoint(stablelm)
    message = (
        "No name in the checkpoint that is still to be read begins with video., given in ignored or renamed. Leave"
    )
    for options in ({"ignored": ["video."]}, {"renamed": {"video.": "model."}}):
        with pytest.raises(ConfigError, match=re.escape(message)):
            dm.import_dynmoe_checkpoint(stablelm(), tensors, **options)
    again = tensors | {"extra.norm.weight": torch.ones(D)}
    with pytest.raises(ConfigError, match=r"renamed gives both \S+ and extra.norm.weight the name model.norm.weight"):
        dm.import_dynmoe_checkpoint(stablelm(), again, renamed={"extra.": "model."})


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def pickled_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Fraction(1)}, folder / "pytorch_model.bin")  # of a class that no package calls safe


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), r"holds no weights: neither model\*.safetensors nor pytorch"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is damaged: JSONDecodeError"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
            "names gone.safetensors, which is not there. Copy the whole folder again.",
        ),
        (truncated, "model.safetensors cannot be read as a file of tensors: SafetensorError"),
        (pickled_code, "pytorch_model.bin cannot be read as a file of tensors: UnpicklingError"),
        (
            lambda f: save_file({"lm_head.weight": torch.ones(1)}, f / "model-2.safetensors"),
            "lm_head.weight is in .* and in another file of weights beside it. Leave one set",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged: JSONDecodeError"),
        (
            lambda f: (f / "config.json").write_text('{"num_attention_heads": 4, "norm_eps": 0.5, "rope_pct": 0.75}'),
            "config.json has norm_eps 0.5 but the model's layer_norm_eps is 1e-05. Build the model with it. .*has "
            "num_attention_heads 4 but the model's num_attention_heads is 2.*has rope_pct 0.75 but the model's "
            "partial_rotary_factor is 0.25",
        ),
    ],
)
def test_folders_that_cannot_be_read_name_the_file(damage: Any, message: str, tmp_path: Path) -> None:
    write_weights(tmp_path, checkpoint(stablelm), "safetensors", 1, indexed=False)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        dm.import_dynmoe_checkpoint(stablelm(), tmp_path)


def test_a_configuration_that_agrees_is_no_obstacle(tmp_path: Path) -> None:
    write_weights(tmp_path, checkpoint(stablelm), "safetensors", 1, indexed=False)
    values = {"model_type": "moe_llava_stablelm", "num_attention_heads": 2, "norm_eps": 1e-5, "rope_theta": 10000}
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_key_value_heads": None}))
    assert moe(dm.import_dynmoe_checkpoint(stablelm(), tmp_path)).keys() == MASKS.keys()


# --- what does not fit ---

EXPERT = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts."
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a missing dense tensor": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        "It lacks model.layers.1.mlp.up_proj.weight. Give all shards of one checkpoint, or `renamed`",
    ),
    "a missing tensor of an expert": (
        lambda t: t.pop(f"{EXPERT}2.down_proj.weight"),
        f"It lacks {EXPERT}2.down_proj.weight.",
    ),
    "a missing tensor of a gate": (lambda t: t.pop(gate(2) + "gates"), f"It lacks {gate(2)}gates."),
    "an unexpected tensor": (
        lambda t: t.update({"model.mm_projector.a": torch.ones(1)}),
        "The model has no place for model.mm_projector.a. Give a model of the checkpoint's architecture, or the "
        "beginnings of these names as `ignored` or `renamed`.",
    ),
    "many unexpected tensors": (
        lambda t: t.update({f"extra.{i}": torch.ones(1) for i in range(6)}),
        "The model has no place for extra.0, extra.1, extra.2, extra.3 and 2 more.",
    ),
    "a residual layer": (
        lambda t: t.update({"model.layers.0.mlp.coefficient.weight": torch.ones(2, D)}),
        "no place for model.layers.0.mlp.coefficient.weight",
    ),
    "a top-k gate": (
        lambda t: t.update({gate(0) + "weight": torch.ones(E, D)}),
        f"no place for {gate(0)}weight",
    ),
    "an expert beyond the mask": (
        lambda t: t.update({f"{EXPERT}4.up_proj.weight": torch.ones(F, D)}),
        f"no place for {EXPERT}4.up_proj.weight",
    ),
    "an unknown part of an expert": (
        lambda t: t.update({f"{EXPERT}0.up_proj.bias": torch.ones(F)}),
        f"no place for {EXPERT}0.up_proj.bias",
    ),
    "a layer that the model has not": (
        lambda t: t.update({gate(7) + "gates": torch.ones(E)}),
        f"no place for {gate(7)}gates",
    ),
    "a wrong shape of an expert": (
        lambda t: t.update({f"{EXPERT}3.up_proj.weight": torch.ones(D, F)}),
        f"Shapes differ: {EXPERT}3.up_proj.weight [16, 24] where the model has [24, 16]. Give a model of",
    ),
    "a wrong shape of a gate": (
        lambda t: t.update({gate(0) + "sim_matrix": torch.ones(E, D)}),
        f"Shapes differ: {gate(0)}sim_matrix [4, 16] where the model has [16, 4].",
    ),
    "a wrong shape elsewhere": (
        lambda t: t.update({"model.norm.weight": torch.ones(D + 1)}),
        "Shapes differ: model.norm.weight [17] where the model has [16].",
    ),
    "no live expert": (
        lambda t: t[gate(2) + "experts_mask"].zero_(),
        f"{gate(2)}experts_mask is 0 for all 4 experts. At least one must be live.",
    ),
    "a mask that is a weight": (
        lambda t: t[gate(2) + "experts_mask"].mul_(0.5),
        f"{gate(2)}experts_mask is [0.0, 0.5, 0.0, 0.5] but must be 0 or 1, since the authors' gate multiplies by it.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named_and_nothing_changes(case: str) -> None:
    change, message = WRONG[case]
    tensors = checkpoint(stablelm)
    change(tensors)
    model = stablelm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        dm.import_dynmoe_checkpoint(model, tensors)
    assert str(raised.value).startswith("The checkpoint does not fit StableLmForCausalLM. ")
    assert message in str(raised.value)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_dense_checkpoint_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"no layer of DynMoE: .* Its names are model.embed_tokens.weight, .* more"
    ):
        dm.import_dynmoe_checkpoint(stablelm(), stablelm().state_dict())


def test_tied_parameters_may_be_there_twice_if_they_are_equal() -> None:
    tensors = checkpoint(qwen2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    dm.import_dynmoe_checkpoint(qwen2(), tensors)
    tensors["lm_head.weight"] += 1
    message = (
        "are one parameter of the model but differ in the checkpoint. Build the model with tie_word_embeddings=False"
    )
    with pytest.raises(CheckpointError, match=message):
        dm.import_dynmoe_checkpoint(qwen2(), tensors)


@pytest.mark.parametrize(
    ("build_model", "options", "message"),
    [
        (stablelm, {"num_slots": 2}, "num_slots is 2 but model.layers.0.mlp has 3 experts. Use 3 or more."),
        (stablelm, {"ep_size": 0}, "ep_size is 0 but must be at least 1."),
        (stablelm, {"ep_size": 2}, "ep_size is 2 but there is one data-parallel rank."),
        (lambda: stablelm(hidden_act="relu"), {}, "computes something else than any expert with its weights would"),
        (
            lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0)),
            {},
            "model.layers.0.mlp has one linear, gate_up_proj, for an expert's w1 and w3",
        ),
    ],
)
def test_models_and_sizes_that_cannot_work_are_refused(build_model: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        dm.import_dynmoe_checkpoint(build_model(), checkpoint(stablelm), **options)
    assert message in str(raised.value)


def on_two_ranks(rank: int, world_size: int) -> tuple[float, tuple[int | None, ...], str]:
    """The difference from one rank's layer, the placement, and what a bad rank's error gives."""
    tensors = checkpoint(stablelm)
    alone = moe(dm.import_dynmoe_checkpoint(stablelm(), tensors))[0].eval()
    layer = moe(dm.import_dynmoe_checkpoint(stablelm(), tensors, ep_size=2))[0].eval()
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        difference = float((layer(x) - alone(x)).abs().max())
    if rank:
        del tensors[gate(0) + "gates"]
    try:
        dm.import_dynmoe_checkpoint(stablelm(), tensors, ep_size=2)
        message = ""
    except (CheckpointError, DivergenceError) as error:
        message = f"{type(error).__name__}: {error}"
    return difference, layer.placement.expert_ids, message


def test_experts_are_shared_by_ranks_and_one_ranks_error_is_everyones() -> None:
    (first, ids, message), (second, _, own) = run_ranks(on_two_ranks, 2)
    assert ids == (0, 2, 3, None) or sorted(id_ for id_ in ids if id_ is not None) == [0, 2, 3]
    assert len(ids) == 4 and first < 1e-5 and second < 1e-5
    assert message.startswith("DivergenceError") and f"It lacks {gate(0)}gates" in message
    assert own.startswith("CheckpointError")
