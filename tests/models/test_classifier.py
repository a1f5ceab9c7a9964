"""Classifiers from a pretrained folder or from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.run_config import small_run
from tests.helpers.spawn import run_ranks
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import dynmoe_ds as dm
from dynmoe_ds.config.schema import (
    BertClassifierConfig,
    ImageEncoderSizes,
    RunConfig,
    TransformerSizes,
    ViTClassifierConfig,
)
from dynmoe_ds.engine.activation_checkpointing import non_reentrant_checkpoint
from dynmoe_ds.errors import ConfigError, DynMoEError
from dynmoe_ds.models import Head, bert_backbone, build_classifier, vit_backbone

SIZES = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "ffn_hidden_size": 24}
HUGGING_FACE_SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
POOL = {"dropout": 0.1, "moe_layers": (1,), "num_experts": 3, "num_slots": 4}
VOCAB_SIZE, LENGTH, IMAGE = 30, 12, 8


def bert(**changes: Any) -> RunConfig:
    model = BertClassifierConfig(**({"pretrained": None, "sizes": TransformerSizes(**SIZES), **POOL} | changes))
    return small_run(model=model)


def vit(**changes: Any) -> RunConfig:
    sizes = ImageEncoderSizes(**SIZES, patch_size=4)
    return small_run(model=ViTClassifierConfig(**({"pretrained": None, "sizes": sizes, **POOL} | changes)))


def build(config: RunConfig, labels: tuple[str, ...] = ("no", "yes"), image_size: int = IMAGE, **text: int) -> Any:
    head = Head(labels=labels)
    if isinstance(config.model, ViTClassifierConfig):
        return build_classifier(config, vit_backbone(config.model, head, image_size=image_size))
    lengths = {"vocab_size": VOCAB_SIZE, "max_length": LENGTH, **text}
    return build_classifier(config, bert_backbone(config.model, head, **lengths))


@pytest.fixture
def saved_bert(tmp_path: Path) -> Path:
    """As the published BERTs are: pretrained, without a classifier, in 16 bits."""
    torch.manual_seed(3)
    config = BertConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=LENGTH, **HUGGING_FACE_SIZES)
    BertForPreTraining(config).half().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def saved_vit(tmp_path: Path) -> Path:
    """As the published DeiTs are: with a classifier for classes of another number."""
    torch.manual_seed(3)
    config = ViTConfig(image_size=IMAGE, patch_size=4, num_labels=7, **HUGGING_FACE_SIZES)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.parametrize("make", [bert, vit])
def test_random_weights_follow_the_seed_and_leave_the_global_state_alone(make):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    config = make()
    first, again, other = (build(c).state_dict() for c in (config, config, small_run(model=config.model, seed=1)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(other["classifier.weight"], first["classifier.weight"])
    gate = next(name for name in first if name.endswith("router.weight"))
    assert not torch.equal(other[gate], first[gate])


@pytest.mark.parametrize(("make", "path"), [(bert, "bert.encoder.layer.1.intermediate"), (vit, "vit.layers.1.mlp")])
def test_the_model_is_as_configured(make, path):
    model = build(make(dropout=0.25), labels=("a", "b", "c"))
    config = model.config
    assert (config.num_labels, config.problem_type, config.id2label[2]) == (3, "single_label_classification", "c")
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.25)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, dm.MoELayer)}
    assert list(layers) == [path]
    assert (int(layers[path].active.sum()), layers[path].num_slots) == (3, 4)
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def test_a_head_without_labels_is_a_regression():
    model = build(bert(), labels=())
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    output = model.eval()(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([2.0]))
    assert output.loss.item() == pytest.approx((output.logits.item() - 2.0) ** 2, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "saved"), [(bert, "saved_bert"), (vit, "saved_vit")], ids=["pretraining heads", "another head"]
)
def test_pretrained_weights_are_kept_and_the_head_is_new(make, saved, request):
    folder = request.getfixturevalue(saved)
    model = build(make(pretrained=str(folder), sizes=None), labels=("a", "b", "c"))
    dense = (BertModel if make is bert else ViTForImageClassification).from_pretrained(folder, dtype=torch.float32)
    prefix = "bert." if make is bert else ""
    old = {prefix + name: value for name, value in dense.state_dict().items() if not name.startswith("classifier.")}
    new = model.state_dict()
    absent = [name for name in old if name not in new]
    assert absent and all(".1.intermediate.dense." in n or ".1.output.dense." in n or ".1.mlp." in n for n in absent)
    assert all(torch.equal(new[name], value) for name, value in old.items() if name in new)
    first = "intermediate.dense" if make is bert else "mlp.fc1"
    (experts,) = (value for name, value in new.items() if name.endswith("experts.w1"))
    (source,) = (value for name, value in old.items() if f".1.{first}.weight" in name)
    assert torch.equal(experts[0], source)
    assert new["classifier.weight"].shape == (3, 16) and new["classifier.weight"].any()
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def _roberta(folder: Path) -> None:
    RobertaModel(RobertaConfig(vocab_size=VOCAB_SIZE, **HUGGING_FACE_SIZES)).save_pretrained(folder)


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _damaged(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def _another_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))


def _another_width(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"intermediate_size": 24', '"intermediate_size": 32'))


def _no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_roberta, "holds a model of type roberta where bert is needed"),
        (_without_weights, "whose weights cannot be loaded"),
        (_damaged, "whose weights cannot be loaded"),
        (_another_config, r"lack 16 tensors of its configuration.*such as bert\.encoder\.layer\.3\.attention"),
        (_another_width, r"in other shapes, such as bert\.encoder\.layer\.0\.intermediate\.dense\.bias"),
        (_no_config, "whose configuration cannot be read"),
    ],
)
def test_a_folder_that_does_not_hold_the_model_is_refused(spoil, message, saved_bert):
    spoil(saved_bert)
    with pytest.raises(ConfigError, match=message):
        build(bert(pretrained=str(saved_bert), sizes=None))


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"model\.pretrained is '/nowhere', which is not a folder here"):
        build(vit(pretrained="/nowhere", sizes=None))


def test_input_that_a_pretrained_model_cannot_take_is_refused(saved_bert, saved_vit):
    with pytest.raises(ConfigError) as caught:
        build(bert(pretrained=str(saved_bert), sizes=None), vocab_size=VOCAB_SIZE + 1, max_length=LENGTH + 1)
    vocabulary, length = caught.value.faults
    assert f"data.tokenizer has 31 tokens but the model in {saved_bert} has 30" in vocabulary
    assert "data.sequence_length is 13" in length and "Use 12 or fewer" in length
    with pytest.raises(ConfigError, match=r"data\.image_size is 16 .* is for images of 8. Use data\.image_size=8"):
        build(vit(pretrained=str(saved_vit), sizes=None), image_size=16)


def test_a_layer_that_the_model_lacks_is_refused(saved_vit):
    with pytest.raises(ConfigError, match="layers names 3"):
        build(vit(pretrained=str(saved_vit), sizes=None, moe_layers=(3,)))


@pytest.mark.parametrize("make", [bert, vit])
def test_activations_are_checkpointed_as_configured(make):
    def functions(kind: str) -> list[Any]:
        model = build(small_run(model=make().model, parallel__activation_checkpointing=kind)).train()
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        assert len(layers) == 3 and all(layer.gradient_checkpointing == (kind != "none") for layer in layers)
        return [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]

    assert functions("none") == [None] * 3
    assert functions("deepspeed") == [non_reentrant_checkpoint] * 3
    assert all(function.func is torch.utils.checkpoint.checkpoint for function in functions("torch"))


def _one_rank_without_weights(rank: int, world_size: int, folder: Path) -> str:
    try:
        build(bert(pretrained=str(folder) if rank == 0 else "/nowhere", sizes=None))
    except DynMoEError as error:
        return str(error)
    return "no error"


def test_a_rank_without_the_folder_stops_all(saved_bert):
    first, second = run_ranks(_one_rank_without_weights, 2, saved_bert)
    assert "rank 1: ConfigError: model.pretrained is '/nowhere'" in first
    assert second.startswith("model.pretrained is '/nowhere'")
