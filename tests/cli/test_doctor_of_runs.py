"""What the doctor says of a run's weights and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.glue import write_tokenizer
from tests.helpers.recipe_parts import recipe_overrides, write_recipe_parts
from tests.helpers.vision_language import DATA, write_digits
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from dynmoe_ds.cli.doctor_of_runs import run_findings
from dynmoe_ds.cli.main import main
from dynmoe_ds.config.load import load_config
from dynmoe_ds.errors import DynMoEError
from dynmoe_ds.models.random_weights import seeded_weights
from dynmoe_ds.training.tasks.vision_language import VisionLanguage


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("doctor") / "digits")


def examine(digits: Path, *overrides: str) -> dict[str, tuple[str, str]]:
    data = [f"data.{key}={digits / name}" for key, name in DATA.items()]
    findings = run_findings(["experiment=demo_vl", "stage=demo_experts", "run_dir=never", *data, *overrides])
    return {finding.subject: (finding.state, finding.text) for finding in findings}


def test_a_run_that_has_everything(digits: Path) -> None:
    found = examine(digits)
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["data.path"][1] == f"48 samples in {digits / 'train.json'}"
    assert found["data.held_out_path"][1].startswith("10 samples in") and found["data.tokenizer"][1] == "54 tokens"
    assert found["ranks"][1] == "2 can be started here"


def test_pretrained_folders_are_looked_into(digits: Path, parts: Path, tmp_path: Path) -> None:
    whole, empty = parts / "clip", tmp_path / "empty"
    empty.mkdir()
    models = [f"model.vision_pretrained={whole}", "model.vision_sizes=null", "model.text_sizes=null"]
    models += ["data.image_size=336"]
    found = examine(digits, *models, f"model.text_pretrained={empty}")
    assert found["model.vision_pretrained"] == ("ok", f"{whole} has a configuration and weights")
    lacking = f"{empty} has no config.json and no weights (model.safetensors or pytorch_model.bin)"
    assert found["model.text_pretrained"] == ("missing", f"{lacking}; download the whole model")
    found = examine(digits, *models, "model.text_pretrained=gone")
    assert found["model.text_pretrained"][0] == "missing" and found["model.text_pretrained"][1].startswith(
        "gone is not a"
    )


def test_samples_are_counted(digits: Path, tmp_path: Path) -> None:
    samples = json.loads((digits / "train.json").read_text())
    samples[0]["image"] = "gone.png"
    file = tmp_path / "more.json"
    file.write_text(json.dumps(samples))
    advice = {"stop": "Repair them, or leave them out with", "skip": "They are left out (data.on_broken=skip)."}
    for policy, state in (("stop", "missing"), ("skip", "note")):
        found = examine(digits, f"data.path={file}", f"data.on_broken={policy}")["data.path"]
        assert found[0] == state
        assert found[1].startswith(f"47 samples in {file}, and 1 that cannot be used:\n  - 1 x an image is missing: ")
        assert found[1].splitlines()[-1].startswith(advice[policy])
    file.write_text("[")
    assert "is not valid JSON" in examine(digits, f"data.path={file}")["data.path"][1]
    empty = tmp_path / "tokenizer"
    empty.mkdir()
    state, text = examine(digits, f"data.tokenizer={empty}")["data.tokenizer"]
    assert state == "missing" and "holds no tokenizer that can be read" in text


def test_other_data_are_looked_for(tmp_path: Path) -> None:
    found = run_findings(["experiment=image_vit_small", f"data.path={tmp_path}", "run_dir=never"])
    assert [(f.state, f.text) for f in found if f.subject == "data.path"] == [("ok", f"{tmp_path} is there")]
    found = run_findings(["experiment=image_vit_small", "data.path=gone", "run_dir=never"])
    (missing,) = (finding for finding in found if finding.subject == "data.path")
    assert missing.state == "missing" and missing.text.startswith("gone is not there (seen from")
    found = run_findings(["data=token_shards", f"data.path={tmp_path}", "run_dir=never"])
    (missing,) = (finding for finding in found if finding.subject == "data.path")
    assert missing.state == "missing" and "which has no index.json here" in missing.text


RECIPES = ("stablelm", "qwen", "phi")
OF_RECIPE = {"configuration", "ranks", "model.vision_pretrained", "model.text_pretrained", "data.path"}
OF_RECIPE |= {"data.held_out_path", "data.tokenizer"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe_parts(tmp_path_factory.mktemp("recipes"), *RECIPES)


def by_subject(overrides: list[str]) -> dict[str, tuple[str, str]]:
    findings = list(run_findings(["run_dir=never", *overrides]))
    found = {finding.subject: (finding.state, finding.text) for finding in findings}
    assert len(found) == len(findings), "one line for each part"
    return found


def examine_recipe(parts: Path, name: str, *overrides: str) -> dict[str, tuple[str, str]]:
    """What is said of the language's stage of a recipe: the command for all stages, some of its parts changed."""
    changed = [f"language:{text}" for text in overrides]
    return by_subject([*recipe_overrides(parts, name), *changed, "stage=language"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_has_everything(name: str, parts: Path) -> None:
    found = examine_recipe(parts, name)
    assert found.keys() == OF_RECIPE and {state for state, _ in found.values()} == {"ok"}
    assert found["ranks"][1] == "8 can be started here"
    assert found["data.path"][1].startswith("12 samples in ")


VISION, TEXT, TOKENIZER = "model.vision_pretrained", "model.text_pretrained", "data.tokenizer"
LACKING = {
    "the decoder": (TEXT, "gone", "gone is not a folder here"),
    "its weights": (TEXT, "{empty}", "{empty} has no weights (model.safetensors or pytorch_model.bin); download the"),
    "a part of them": (TEXT, "{part}", "{part} has no model-2.safetensors; download the whole model"),
    "their index": (TEXT, "{torn}", "{torn} has no pytorch_model.bin.index.json that can be read; download the"),
    "the tower": (VISION, "gone", "gone is not a folder here"),
    "its configuration": (VISION, "{bare}", "{bare} has no config.json; download the whole model"),
    "the tokenizer": (TOKENIZER, "gone", "data.tokenizer is 'gone', which does not exist here ("),
    "its files": (TOKENIZER, "{empty}", "data.tokenizer is '{empty}' but holds no tokenizer that can be read"),
    "training data": ("data.path", "gone.json", "data.path is 'gone.json', which is not a file here ("),
    "held-out data": ("data.held_out_path", "gone.json", "data.held_out_path is 'gone.json', which is not a file here"),
}


@pytest.fixture(scope="module")
def damaged(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models that lack something."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("empty", "part", "torn", "bare")}
    for name in ("empty", "part", "torn"):
        (folders[name] / "config.json").write_text("{}")
    (folders["bare"] / "model.safetensors").touch()
    (folders["part"] / "model-1.safetensors").touch()
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folders["part"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folders["torn"] / "pytorch_model.bin.index.json").write_text("{")
    return folders


@pytest.mark.parametrize("what", LACKING)
def test_a_recipe_that_lacks_one_part_names_it_alone(what: str, parts: Path, damaged: dict[str, Path]) -> None:
    subject, value, text = LACKING[what]
    found = examine_recipe(parts, "phi", f"{subject}={value}".format(**damaged))
    assert {key for key, (state, _) in found.items() if state != "ok"} == {subject}
    assert found[subject][0] == "missing" and found[subject][1].startswith(text.format(**damaged)), found[subject]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_lacks_every_part_names_all(name: str, parts: Path) -> None:
    gone = {subject: "gone.json" for subject, _, _ in LACKING.values()}
    found = examine_recipe(parts, name, *(f"{subject}={value}" for subject, value in gone.items()))
    assert {key for key, (state, _) in found.items() if state == "missing"} == gone.keys()
    assert found["configuration"][0] == found["ranks"][0] == "ok"


def test_weights_in_parts_are_whole_when_all_parts_are_there(parts: Path, tmp_path: Path) -> None:
    folder = copied(parts / "phi", tmp_path / "phi")
    halves = [folder / f"model-{half}.safetensors" for half in (1, 2)]
    tensors = sorted(load_file(folder / "model.safetensors").items())
    for half, file in enumerate(halves):
        save_file(dict(tensors[half::2]), file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: halves[i % 2].name for i, (name, _) in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert examine_recipe(parts, "phi", f"{TEXT}={folder}")[TEXT][0] == "ok"
    cut_off(halves[1])
    state, text = examine_recipe(parts, "phi", f"{TEXT}={folder}")[TEXT]
    assert state == "missing" and text.startswith(f"{halves[1]} cannot be read as a file of weights: ")
    halves[1].unlink()
    lacking = f"{folder} has no model-2.safetensors; download the whole model"
    assert examine_recipe(parts, "phi", f"{TEXT}={folder}")[TEXT] == ("missing", lacking)


@pytest.mark.parametrize("is_zip", [True, False], ids=["now", "before torch 1.6"])
def test_weights_of_torch(is_zip: bool, parts: Path, tmp_path: Path) -> None:
    folder = copied(parts / "phi", tmp_path / "phi")
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), file, _use_new_zipfile_serialization=is_zip)
    (folder / "model.safetensors").unlink()
    assert examine_recipe(parts, "phi", f"{TEXT}={folder}")[TEXT][0] == "ok"


def copied(folder: Path, to: Path, file: str = "config.json", **values: object) -> Path:
    """The folder again, with other values in one of its JSON files."""
    shutil.copytree(folder, to)
    (to / file).write_text(json.dumps(json.loads((to / file).read_text()) | values))
    return to


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.fixture(scope="module")
def misfits(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with all files, which the runs refuse."""
    root = tmp_path_factory.mktemp("misfits")
    names = ("nothing", "larger", "short", "unread", "other_size", "torn", "cut", "pointer")
    folders = {name: root / name for name in names} | {name: parts / name for name in ("phi", "clip")}
    folders["nothing"].mkdir()
    (folders["nothing"] / "config.json").write_text("{}")
    (folders["nothing"] / "model.safetensors").touch()
    vision = json.loads((parts / "clip" / "config.json").read_text())["vision_config"]
    copied(parts / "clip", folders["larger"], vision_config=vision | {"image_size": 384})
    copied(parts / "phi", folders["short"], max_position_embeddings=1024)
    for name in ("unread", "other_size", "torn"):
        copied(parts / "clip", folders[name])
    (folders["unread"] / "preprocessor_config.json").write_text("{")
    (folders["other_size"] / "preprocessor_config.json").write_text('{"crop_size": {"height": 224, "width": 224}}')
    (folders["torn"] / "config.json").write_text('{"model_type": "clip", "vision_config": 3}')
    cut_off(copied(parts / "phi", folders["cut"]) / "model.safetensors")
    (copied(parts / "phi", folders["pointer"]) / "model.safetensors").unlink()
    (folders["pointer"] / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    return folders


# subject, folder (or a file in it), what is said of it.
REFUSED = {
    "configuration of no model": (TEXT, "nothing", "{key} is {path!r}, whose configuration cannot be read: Unrec"),
    "and its empty weights": (TEXT, "nothing", " {path}/model.safetensors cannot be read as a file of weights: "),
    "configuration that is torn": (VISION, "torn", "{key} is {path!r}, whose configuration cannot be read: Val"),
    "decoder as tower": (VISION, "phi", "{key} is {path!r}, which holds a model of type phi where clip_vision_model"),
    "tower as decoder": (TEXT, "clip", "{key} is {path!r}, which holds a model of type clip where a decoder that"),
    "tower for larger images": (
        VISION,
        "larger",
        "data.image_size is 336 but the tower in {path} is for images of 384",
    ),
    "decoder of shorter texts": (TEXT, "short", "data.sequence_length is 2048 but the model in {path} takes at most"),
    "statistics that cannot be read": (VISION, "unread", "{path}/preprocessor_config.json cannot be used: JSONDecode"),
    "statistics of other images": (VISION, "other_size", "{path}/preprocessor_config.json cannot be used: ValueError"),
    "tokenizer without an end": (TOKENIZER, "phi/tokenizer.json", "data.tokenizer names no end-of-text token (eos_to"),
    "weights that end early": (TEXT, "cut", "{path}/model.safetensors cannot be read as a file of weights: "),
    "weights that were never fetched": (
        TEXT,
        "pointer",
        "{path}/pytorch_model.bin cannot be read as a file of weights",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_run_refuses_is_told(what: str, parts: Path, misfits: dict[str, Path], tmp_path: Path) -> None:
    """And the run refuses it, where that is before it loads weights in the same words."""
    subject, name, text = REFUSED[what]
    folder, _, file = name.partition("/")
    path = misfits[folder] / file
    found = examine_recipe(parts, "phi", f"{subject}={path}")
    assert {key for key, (state, _) in found.items() if state != "ok"} == {subject}
    state, told = found[subject]
    assert state == "missing" and text.format(key=subject, path=f"{path}") in told
    own = [text.removeprefix("language:") for text in recipe_overrides(parts, "phi")]
    own = [text for text in own if not text.startswith(("projector:", "experts:"))]
    config = load_config([*own, f"{subject}={path}", "stage=language", "stage.start=null", f"run_dir={tmp_path}"])
    with pytest.raises(DynMoEError) as caught:
        VisionLanguage(config).build_model()
    assert f"{caught.value}" in told or "whose weights cannot be loaded" in f"{caught.value}"


def test_a_wrong_tower_hides_no_wrong_decoder(parts: Path, misfits: dict[str, Path]) -> None:
    swapped = {VISION: misfits["phi"], TEXT: misfits["clip"], TOKENIZER: misfits["phi"] / "tokenizer.json"}
    found = examine_recipe(parts, "phi", *(f"{key}={path}" for key, path in swapped.items()))
    assert {key for key, (state, _) in found.items() if state != "ok"} == swapped.keys()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 24 positions with its tokenizer, and a ViT for images of 8 pixels."""
    folder = tmp_path_factory.mktemp("encoders")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with seeded_weights(0):
        BertModel(BertConfig(vocab_size=200, max_position_embeddings=24, **sizes)).save_pretrained(folder / "bert")
        ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(folder / "vit")
    write_tokenizer(folder / "bert")
    return folder


def examine_encoder(folder: Path, *overrides: str) -> dict[str, tuple[str, str]]:
    """What is said of a model and its tokenizer."""
    found = by_subject([f"data.path={folder}", f"model.pretrained={folder}", *overrides])
    return {key: finding for key, finding in found.items() if key in ("model.pretrained", TOKENIZER)}


def test_a_bert_and_its_tokenizer(encoders: Path, tmp_path: Path) -> None:
    bert = ("experiment=glue_bert_large", "data.sequence_length=24")
    folder = encoders / "bert"
    found = examine_encoder(folder, *bert)
    assert found["model.pretrained"] == ("ok", f"{folder} has a configuration and weights")
    assert found[TOKENIZER][0] == "ok" and found[TOKENIZER][1].endswith(" tokens")
    state, text = examine_encoder(folder, *bert, "data.sequence_length=25")["model.pretrained"]
    assert state == "missing" and text.startswith(f"data.sequence_length is 25 but the model in {folder} takes at most")
    small = copied(folder, tmp_path / "small", vocab_size=3)
    cut_off(small / "model.safetensors")
    state, text = examine_encoder(small, *bert)["model.pretrained"]
    assert state == "missing" and f"tokens but the model in {small} has 3. Use the tokenizer of" in text
    assert f"{small}/model.safetensors cannot be read as a file of weights: " in text
    (small / "tokenizer.json").write_text("{")
    state, text = examine_encoder(folder, *bert, f"{TOKENIZER}={small / 'tokenizer.json'}")[TOKENIZER]
    assert state == "missing" and "holds no tokenizer that can be read" in text
    vit = encoders / "vit"
    found = examine_encoder(vit, *bert)
    assert found["model.pretrained"][1].endswith("which holds a model of type vit where bert is needed.")
    assert found[TOKENIZER][0] == "missing"
    assert examine_encoder(folder, *bert, f"{TOKENIZER}=gone")[TOKENIZER][1].startswith("gone is not there (seen from ")


def test_a_vit(encoders: Path) -> None:
    vit = ("experiment=image_vit_small", "model.sizes=null")
    folder = encoders / "vit"
    fine = ("ok", f"{folder} has a configuration and weights")
    assert examine_encoder(folder, *vit, "data.image_size=8") == {"model.pretrained": fine}
    wrong = f"data.image_size is 224 but the model in {folder} is for images of 8. Use data.image_size=8."
    assert examine_encoder(folder, *vit) == {"model.pretrained": ("missing", wrong)}
    state, text = examine_encoder(encoders / "bert", *vit)["model.pretrained"]
    assert state == "missing" and text.endswith("which holds a model of type bert where vit is needed.")


def test_a_recipe_without_its_images(parts: Path, tmp_path: Path) -> None:
    found = examine_recipe(parts, "phi", "data.image_folder=gone")
    assert found["data.image_folder"][0] == "missing"
    assert found["data.image_folder"][1].startswith("data.image_folder is 'gone', but there is no such folder here (")
    found = examine_recipe(parts, "phi", f"data.image_folder={tmp_path}", f"data.path={parts / 'captions.json'}")
    state, text = found["data.path"]
    assert state == "missing" and "6 x an image is missing: c0" in text and "the right data.image_folder" in text
    found = examine_recipe(parts, "phi", f"data.image_folder={tmp_path}")
    assert found["data.path"][0] == "note" and "6 x an image is missing: i0" in found["data.path"][1]


def test_a_recipe_with_too_few_gpus(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    state, text = examine_recipe(parts, "qwen")["ranks"]
    assert state == "missing" and text.startswith(
        "parallel.num_ranks is 8 but there are 4 GPUs here. Use parallel.num_"
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_which_nothing_is_given_lists_all_that_it_needs(name: str) -> None:
    findings = list(run_findings([f"experiment=moe_llava_{name}", "stage=projector", "run_dir=never"]))
    assert {(finding.state, finding.subject) for finding in findings} == {("missing", "configuration")}
    told = [finding.text.split(" ", 1)[0] for finding in findings]
    assert sorted(told) == ["One", "One", "data.held_out_path", "data.path", "data.tokenizer"]


def test_the_command_of_all_stages_is_looked_at_stage_by_stage(parts: Path) -> None:
    """What they share is said once."""
    found = by_subject(recipe_overrides(parts, "phi"))
    assert {state for state, _ in found.values()} == {"ok"}
    wanted = {"projector": "6 samples in ", "language": "12 samples in ", "experts": "12 samples in "}
    for number, (stage, samples) in enumerate(wanted.items(), 1):
        assert found.pop(f"{stage}: configuration")[1] == f"without a fault; run folder never/{number}_{stage}"
        assert found.pop(f"{stage}: data.path")[1].startswith(samples)
    assert found.keys() == OF_RECIPE - {"configuration", "data.path"}


def test_what_one_stage_lacks_is_told_under_its_name(parts: Path) -> None:
    given = [text for text in recipe_overrides(parts, "phi") if not text.startswith("projector:")]
    found = by_subject([*given, "projector:data.path=gone.json"])
    assert [key for key, (state, _) in found.items() if state != "ok"] == ["projector: data.path"]
    found = by_subject([*given, "data.path=gone.json"])
    assert [key for key, (state, _) in found.items() if state != "ok"] == ["projector: data.path"]
    found = by_subject([*recipe_overrides(parts, "phi"), "stages=projector,experts"])
    assert found["configuration"] == (
        "missing",
        f"language:data.path={parts}/instructions.json is for a stage that is not trained. The stages are projector, "
        "experts.",
    )


def test_a_stage_that_has_come_to_its_end_lacks_nothing(parts: Path, tmp_path: Path) -> None:
    given = [text for text in recipe_overrides(parts, "phi") if not text.startswith("projector:")]
    finished = tmp_path / "1_projector"
    finished.mkdir()
    (finished / "finished.json").write_text('{"steps": 1}')
    found = by_subject([*given, f"run_dir={tmp_path}"])
    assert found["projector: run_dir"] == ("ok", f"{finished} has come to its end; `dynmoe stages` leaves it alone")
    assert {state for state, _ in found.values()} == {"ok"}, "nor are its data looked for"
    assert by_subject([*given, f"run_dir={tmp_path}", "stage=projector"]).keys() == {"run_dir"}


def test_a_recipe_without_a_stage_is_looked_at_in_all_of_them() -> None:
    findings = list(run_findings(["experiment=moe_llava_phi"]))
    assert {(finding.state, finding.subject) for finding in findings} == {("missing", "configuration")}
    told = [finding.text.split(" ", 1)[0] for finding in findings]
    assert sorted(told) == ["One", "One", "data.held_out_path", "data.path", "data.tokenizer"]
    findings = list(run_findings(["experiment=moe_llava_phi", "experts:run_dir=other"]))
    assert findings[0].text == "run_dir=other cannot be of one stage: `dynmoe stages` sets it. Leave it out."


def test_faults_are_missing_and_end_with_1(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *recipe_overrides(parts, "phi"), "projector:data.path=gone.json"]) == 1
    told = capsys.readouterr().out
    assert "\nmissing  projector: data.path data.path is 'gone.json', which is not a file here (" in told
    assert told.endswith("\nMissing: projector: data.path.\n")
