"""What cannot work of vision-language runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.helpers.run_config import changed, small_run
from tests.helpers.vision_language import DATA, empty_files, tiny_run

from dynmoe_ds.config.build import build
from dynmoe_ds.config.load import load_config, to_yaml
from dynmoe_ds.config.schema import AdaptationConfig, ImageEncoderSizes, RunConfig, StageConfig, TransformerSizes
from dynmoe_ds.config.validate import find_faults
from dynmoe_ds.errors import ConfigError

VISION = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "ffn_hidden_size": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_run(empty_files(tmp_path_factory.mktemp("digits")), Path("never"), "experts")


def stage(**values: Any) -> StageConfig:
    return StageConfig(**{"trained": ("experts",), "has_experts": True} | values)


def test_the_stages_of_the_demo_and_of_the_papers_have_no_faults(run, tmp_path):
    assert find_faults(run) == []
    files = [f"data.{key}={empty_files(tmp_path / key) / name}" for key, name in DATA.items()]
    files += ["run_dir=never", "training.sample_tokens=0"]
    folders = ["model.vision_pretrained=d", "model.text_pretrained=e"]
    for name in ("projector", "language", "experts"):
        config = load_config(["model=llava", "data=llava", f"stage={name}", *files, *folders])
        assert config.stage is not None and config.stage.has_experts == (name == "experts")
        assert (config.adaptation is None) == (name != "experts")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model__vision_pretrained": "clip"},
            "One of model.vision_pretrained and model.vision_sizes must be set, b",
        ),
        ({"model__text_sizes": None}, "One of model.text_pretrained and model.text_sizes must be set, but neither is."),
        (
            {"model__vision_sizes": ImageEncoderSizes(**VISION | {"num_heads": 3})},
            "model.vision_sizes.hidden_size is 32 but must be a multiple of model.vision_sizes.num_heads (3)",
        ),
        (
            {"model__text_sizes": TransformerSizes(**TEXT | {"num_layers": 0})},
            "model.text_sizes.num_layers is 0 but must be at least 1.",
        ),
        (
            {"model__text_sizes": TransformerSizes(**TEXT | {"num_heads": 32})},
            "model.text_sizes.hidden_size is 32 but must be a multiple of 2 x model.text_sizes.num_heads (2 x 32).",
        ),
        ({"model__moe_layers": ()}, "model.moe_layers is empty, so that no layer has experts."),
        (
            {"model__moe_layers": (0, 3, -4)},
            "model.moe_layers names 3, -4, but the layers are 0 to 2, or -1 to -3",
        ),
        ({"model__moe_layers": (2, 0, -1)}, "model.moe_layers is [2, 0, -1], which names a layer twice. Name each on"),
        ({"model__num_experts": 9}, "model.num_experts is 9 but must be between 1 and model.num_slots (8)"),
        (
            {"data__image_size": 33},
            "data.image_size is 33 but must be a multiple of model.vision_sizes.patch_size (8). Use 32 or 40.",
        ),
        ({"data__path": "gone"}, "data.path is 'gone', which is not a file here ("),
        ({"data__held_out_path": "gone"}, "data.held_out_path is 'gone', which is not a file here ("),
        ({"data__image_folder": "gone"}, "data.image_folder is 'gone', but there is no such folder here ("),
        ({"data__tokenizer": "gone"}, "data.tokenizer is 'gone', which does not exist here ("),
        ({"data__path": None}, "data.path is null. Name the JSON file to learn from."),
        ({"data__held_out_path": None}, "data.held_out_path is null. Name the JSON file to evaluate on."),
        ({"data__tokenizer": None}, "data.tokenizer is null. Name the folder of the language model's tokenizer."),
        ({"data__sequence_length": 1}, "data.sequence_length is 1 but must be at least 2."),
        ({"data__num_workers": -1}, "data.num_workers is -1 but must be at least 0."),
        (
            {"training__sample_tokens": 2},
            "training.sample_tokens is 2 but data.name is llava, from which no",
        ),
        (
            {"stage": None},
            "model.name is llava but there is no stage. Choose one: stage=projector, ",
        ),
        ({"stage": stage(trained=())}, "stage.trained is empty, so that nothing would be trained."),
        ({"stage": stage(has_experts=False)}, "stage.trained names experts but stage.has_experts is false."),
        ({"stage": stage(start="nowhere")}, "stage.start is 'nowhere', which is not a folder here ("),
        (
            {"stage": stage(trained=("projector",), has_experts=False), "adaptation": AdaptationConfig(1, 1)},
            "adaptation is set but stage.has_experts is false: there is nothing to adapt.",
        ),
    ],
)
def test_faults(values: dict[str, Any], message: str, run: RunConfig) -> None:
    (fault,) = find_faults(changed(run, **values))
    assert fault.startswith(message)


def test_layers_are_named_by_a_word_or_by_numbers(tmp_path: Path) -> None:
    files = empty_files(tmp_path)
    assert tiny_run(files, Path("never"), "experts").model.moe_layers == (0, 2)
    for given, found in (("[1]", (1,)), ("[-1,0]", (-1, 0)), ("second_half", "second_half")):
        run = tiny_run(files, Path("never"), "experts", f"model.moe_layers={given}")
        assert run.model.moe_layers == found and build(yaml.safe_load(to_yaml(run))) == run
    words = "all, even, odd, first_half or second_half"
    for given, message in (
        ("evn", f"model.moe_layers is 'evn'. Did you mean 'even'? Use {words}. Or give a list."),
        ("1", f"model.moe_layers is 1. Use {words}. Or give a list."),
        ("[a]", f"model.moe_layers[0] is 'a' (text) but must be a whole number. Or give {words}."),
    ):
        with pytest.raises(ConfigError) as caught:
            tiny_run(files, Path("never"), "experts", f"model.moe_layers={given}")
        assert caught.value.faults == (message,)
    folders = ["model.vision_pretrained=a", "model.text_pretrained=b", "model.vision_sizes=null"]
    run = tiny_run(files, Path("never"), "experts", *folders, "model.text_sizes=null", "model.moe_layers=[40]")
    assert find_faults(changed(run, model__moe_layers=(40,))) == [], "how many there are is not known yet"


def test_the_projectors_stage_alone_does_not_group(tmp_path: Path) -> None:
    empty_files(tmp_path)
    run = ["experiment=demo_vl", "run_dir=never", *(f"data.{key}={tmp_path / name}" for key, name in DATA.items())]
    found = {name: load_config([*run, f"stage={name}"]).data.group for name in ("projector", "language", "experts")}
    assert found == {"projector": False, "language": True, "experts": True}


def test_other_models_have_no_stages(run):
    (fault,) = find_faults(small_run(stage=run.stage))
    assert fault == "stage is set but model.name is llama, which is trained in one go. Use stage=none."
    assert "model.name is llama but data.name is llava" in " ".join(find_faults(small_run(data=run.data)))
