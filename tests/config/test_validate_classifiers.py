"""What cannot work of the recipes that fine-tune classifiers."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.run_config import changed

from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import ImageEncoderSizes, RunConfig, TransformerSizes
from dynmoe_ds.config.validate import find_faults

BERT_SIZES = TransformerSizes(hidden_size=16, num_layers=24, num_heads=2, ffn_hidden_size=24)
VIT_SIZES = {"hidden_size": 16, "num_layers": 12, "num_heads": 2, "ffn_hidden_size": 24, "patch_size": 16}


@pytest.fixture(scope="module")
def glue() -> RunConfig:
    return load_config(["experiment=glue_bert_large", "model.pretrained=bert", "data.path=glue", "run_dir=never"])


@pytest.fixture(scope="module")
def images() -> RunConfig:
    return load_config(["experiment=image_vit_small", "data.path=images", "run_dir=never"])


def test_the_recipes_have_no_faults(glue, images):
    assert find_faults(glue) == find_faults(images) == []
    assert find_faults(changed(images, model__moe_layers=(-12, 11))) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__sizes": BERT_SIZES}, "One of model.pretrained and model.sizes must be set, but both are."),
        ({"model__pretrained": None}, "One of model.pretrained and model.sizes must be set, but neither is."),
        ({"model__dropout": 1.0}, "model.dropout is 1.0 but must be at least 0 and below 1."),
        ({"model__moe_layers": ()}, "model.moe_layers is empty, so that no layer has experts."),
        ({"model__num_experts": 11}, "model.num_experts is 11 but must be between 1 and model.num_slots (10)"),
        ({"expert__kind": "swiglu"}, "expert.kind is swiglu but the experts of bert_classifier are copies of its FFNs"),
        ({"training__sample_tokens": 3}, "training.sample_tokens is 3 but data.name is glue, from which no model"),
        ({"data__sequence_length": 1}, "data.sequence_length is 1 but must be at least 2."),
        ({"data__num_train": 0}, "data.num_train is 0 but must be at least 1."),
        ({"data__path": None}, "data.path is null. Name the folder of the GLUE download"),
        ({"data__tokenizer": None}, "data.tokenizer is null. Name the pretrained model's folder"),
    ],
)
def test_faults_of_glue(values: dict[str, Any], message: str, glue: RunConfig) -> None:
    (fault,) = find_faults(changed(glue, **values))
    assert fault.startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model__moe_layers": (12, 10, -13)},
            "model.moe_layers names 12, -13, but the layers are 0 to 11, or -1 to -12 from the end.",
        ),
        (
            {"model__sizes": ImageEncoderSizes(**VIT_SIZES | {"num_heads": 3})},
            "model.sizes.hidden_size is 16 but must be a multiple of model.sizes.num_heads (3). Use 15 or 18.",
        ),
        (
            {"model__sizes": ImageEncoderSizes(**VIT_SIZES | {"ffn_hidden_size": 0})},
            "model.sizes.ffn_hidden_size is 0 but must be at least 1.",
        ),
        ({"data__image_size": 0}, "data.image_size is 0 but must be at least 1."),
        (
            {"data__image_size": 225},
            "data.image_size is 225 but must be a multiple of model.sizes.patch_size (16). Use 224 or 240.",
        ),
        ({"data__path": None}, "data.path is null. Name the folder that holds train/<class> and val/<class>"),
        ({"training__sample_tokens": 3}, "training.sample_tokens is 3 but data.name is image_folder"),
    ],
)
def test_faults_of_images(values: dict[str, Any], message: str, images: RunConfig) -> None:
    (fault,) = find_faults(changed(images, **values))
    assert fault.startswith(message)


def test_models_and_data_must_fit(glue, images):
    def faults(model: RunConfig, data: RunConfig) -> list[str]:
        return [fault for fault in find_faults(changed(model, data=data.data)) if "for which it must be" in fault]

    text = load_config(["run_dir=never"])
    assert faults(glue, images) == [
        "model.name is bert_classifier but data.name is image_folder, for which it must be vit_classifier. Choose "
        "another `model` or another `data`."
    ]
    assert "must be bert_classifier" in faults(text, glue)[0]
    assert "must be llama" in faults(images, text)[0]
