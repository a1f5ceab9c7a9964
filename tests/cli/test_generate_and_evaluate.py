"""`dynmoe generate` and `dynmoe evaluate` on what runs have left, in one process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.spawn import run_ranks
from tests.helpers.vision_language import tiny_run, write_digits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import dynmoe_ds as dm
from dynmoe_ds.cli.main import main
from dynmoe_ds.config.load import load_config, to_yaml
from dynmoe_ds.data import read_picture
from dynmoe_ds.data.chat import IGNORED, encode_prompt
from dynmoe_ds.data.conversations import IMAGE_MARKER
from dynmoe_ds.models import build_vision_language
from dynmoe_ds.moe import Placement
from dynmoe_ds.training import Trainer
from dynmoe_ds.training.answer_pictures import draw_answers
from dynmoe_ds.training.saved_run import SavedRun
from dynmoe_ds.training.tasks import VisionLanguage
from dynmoe_ds.training.writer import Prompt, Writer


def train_both(rank: int, world_size: int, digits: str, folder: str) -> None:
    """A vision-language model that gets a part of its answers right, and a small decoder of text."""
    everything = "stage.trained=[vision_tower,projector,language_model]"
    overrides = ["training.steps=120", "training.micro_batch_size=16", "training.eval_every_steps=120", "optim.lr=2e-3"]
    overrides.append(f"data.held_out_path={digits}/learnt.json")
    Trainer(tiny_run(Path(digits), Path(folder) / "vl", "experts", everything, *overrides)).run()
    small = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.dense_ffn_hidden_size=32"]
    small += ["model.expert_ffn_hidden_size=16", "model.num_slots=4", "data.vocab_size=300", "data.sequence_length=16"]
    steps = ["training.steps=2", "training.micro_batch_size=2", "training.eval_sequences=4", "optim.warmup_steps=1"]
    common = ["parallel=single", "telemetry=disabled", "adaptation=none", "training.sample_tokens=0"]
    Trainer(load_config([*small, *steps, *common, f"run_dir={folder}/text"])).run()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    digits = write_digits(folder / "digits")
    # Of what it has learnt the model gets a part right.
    learnt = [sample for sample in json.loads((digits / "train.json").read_text()) if len(sample["conversations"]) == 2]
    (digits / "learnt.json").write_text(json.dumps(learnt[:20]))
    (digits / "odd.json").write_text('[{"text": "a", "images": "b.png"}]')
    run_ranks(train_both, 1, f"{digits}", f"{folder}", timeout_s=200)
    return folder


@pytest.fixture(scope="module")
def exports(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two models, exported."""
    folder = tmp_path_factory.mktemp("exports")
    for name in ("vl", "text"):
        assert main(["export", f"{runs / name}", f"{folder / name}"]) == 0
    return folder


def logged(run_dir: Path) -> dict[str, Any]:
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in last.items() if name.startswith("eval/")}


@pytest.mark.parametrize("name", ["vl", "text"])
def test_evaluation_says_what_the_run_said(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"{runs / name}", "--json"]) == 0
    found, want = json.loads(capsys.readouterr().out), logged(runs / name)
    assert found.keys() == want.keys() and "eval/mean_k" in found and "eval/active_parameters" in found
    scored = "eval/forward_flops_per_token"
    assert found.pop(scored) <= want.pop(scored), "a saved pool has no free slots to score"
    assert found == {key: pytest.approx(value, rel=1e-5) for key, value in want.items()}
    assert main(["evaluate", f"{runs / name}"]) == 0
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(lines["eval/loss"]) == pytest.approx(want["eval/loss"], rel=1e-4)


def test_a_batch_of_unequal_prompts_writes_what_each_does_alone(runs: Path) -> None:
    """And alone what a loop without a cache and without padding says, which is exact match in evaluation."""
    run = SavedRun(runs / "vl")
    held_out = VisionLanguage(run.config).data.held_out
    asked = json.loads((runs / "digits" / "learnt.json").read_text())
    images = runs / "digits" / "images"
    prompts = [
        Prompt(
            text=sample["conversations"][0]["value"], images=(images / sample["image"],) if "image" in sample else ()
        )
        for sample in asked
    ]
    writer = Writer(run)
    lengths: list[int] = []
    watched = run.model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    together = writer.write(prompts, max_new_tokens=3)
    watched.remove()
    assert lengths[0] > writer.form.image.num_tokens and lengths[1:] in ([1], [1, 1]), "there is no cache"
    assert together == [writer.write([prompt], max_new_tokens=3)[0] for prompt in prompts]
    assert len({len(prompt.text) for prompt in prompts}) > 2
    right = [text == sample["conversations"][1]["value"] for text, sample in zip(together, asked, strict=True)]
    assert 0 < sum(right) < len(right), "nothing to tell apart"
    assert sum(right) / len(right) == pytest.approx(logged(runs / "vl")["eval/exact_match"])
    for index, text in enumerate(together):
        batch = held_out.batch([index])
        first = int((batch["labels"][0] != IGNORED).nonzero()[0])
        ids = batch["input_ids"][:, :first]
        pixels = {"pixel_values": batch["pixel_values"]} if prompts[index].images else {}
        with torch.no_grad():
            while ids.shape[1] < first + 3 and ids[0, -1] != writer.tokenizer.eos_token_id:
                ids = torch.cat([ids, run.model(input_ids=ids, **pixels).logits[:, -1:].argmax(-1)], 1)
        assert writer.tokenizer.decode(ids[0, first:], skip_special_tokens=True) == text


def test_two_images_in_a_prompt_beside_prompts_with_one_and_with_none(runs: Path, tmp_path: Path) -> None:
    """Each is answered as alone, and the one about two as by a loop over the batch that training would make of it."""
    run, images = SavedRun(runs / "vl"), runs / "digits" / "images"
    asked = json.loads((runs / "digits" / "learnt.json").read_text())
    first, second = [images / sample["image"] for sample in asked if "image" in sample][:2]
    text = f"{IMAGE_MARKER}\n{IMAGE_MARKER}\nWhich of the two digits is larger?"
    sample = {"id": "two", "image": [first.name, second.name], "conversations": [
        {"from": "human", "value": text}, {"from": "gpt", "value": "nine"}]}  # fmt: skip
    (tmp_path / "two.json").write_text(json.dumps([sample]))
    data = replace(run.config.data, held_out_path=f"{tmp_path}/two.json")
    batch = VisionLanguage(replace(run.config, data=data)).data.held_out.batch([0])
    assert len(batch["pixel_values"]) == 2 and not torch.equal(*batch["pixel_values"])
    writer = Writer(run)
    one = Prompt(text=f"{IMAGE_MARKER}\nWhich digit is this?", images=(second,))
    prompts = [one, Prompt(text=text, images=(first, second)), Prompt(text="What is one plus two?")]
    seen: list[torch.Tensor] = []
    hook = run.model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    together = writer.write(prompts, max_new_tokens=3)
    hook.remove()
    (pixels,) = seen
    assert torch.equal(pixels[1:], batch["pixel_values"])
    assert together == [writer.write([prompt], max_new_tokens=3)[0] for prompt in prompts]
    ids = batch["input_ids"][:, : (start := int((batch["labels"][0] != IGNORED).nonzero()[0]))]
    with torch.no_grad():
        while ids.shape[1] < start + 3 and ids[0, -1] != writer.tokenizer.eos_token_id:
            logits = run.model(input_ids=ids, pixel_values=batch["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert writer.tokenizer.decode(ids[0, start:], skip_special_tokens=True) == together[1]


def test_the_command_prints_a_text_per_prompt(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "digit.png"
    Image.new("L", (16, 16), 200).save(image)
    question = f"{IMAGE_MARKER}Which digit is this?"
    common = ["generate", f"{runs / 'vl'}", "--tokens", "2"]
    assert main([*common, "--prompt", question, "--image", f"{image}"]) == 0
    one = capsys.readouterr().out
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"text": question, "images": [f"{image}"]}, {"text": "What is one plus two?"}]))
    assert main([*common, "--file", f"{file}"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == one.splitlines()[0]


def test_a_decoder_of_text_goes_on_with_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", f"{runs / 'text'}", "--prompt", "The ", "--tokens", "5"]
    drawn = []
    for more in ([], [], ["--temperature", "2", "--seed", "1"], ["--temperature", "2", "--seed", "1"]):
        assert main([*command, *more]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] != drawn[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give one of --prompt and --file."),
        (["--prompt", "a", "--file", "b"], "Give one of --prompt and --file."),
        (["--file", "b", "--image", "c"], "--image belongs to --prompt."),
        (["--prompt", "a", "--tokens", "0"], "--tokens is 0 but must be at least 1."),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1.0 but must not be negative."),
        (["--file", "gone.json"], "gone.json cannot be read: No such file or directory"),
        (["--file", "{}/digits/images"], "cannot be read: Is a directory"),
        (["--file", "{}/vl/config.yaml"], "is no JSON list of prompts (JSONDecodeError"),
        (["--file", "{}/digits/odd.json"], "is no JSON list of prompts (TypeError: text 'a', images 'b.png')"),
        (["--prompt", "<image>Which digit?"], "has 1 <image> for 0 images. Write one for each."),
        (["--prompt", "<image>", "--image", "gone.png"], "gone.png cannot be read as an image"),
    ],
)
def test_prompts_that_cannot_work(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", f"{runs / 'vl'}", *(text.replace("{}", f"{runs}") for text in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_text_models_see_no_images_and_need_something_to_begin_with(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", f"{runs / 'text'}", "--prompt", "a", "--image", "b.png"]) == 2
    assert "holds a model of text, which sees no images." in capsys.readouterr().err
    assert main(["generate", f"{runs / 'text'}", "--prompt", ""]) == 2
    assert "The prompt '' has no token." in capsys.readouterr().err


def test_folders_that_are_no_finished_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"{tmp_path}"]) == 2
    assert "has no config.yaml (seen from" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("")
    assert main(["generate", f"{tmp_path}", "--prompt", "a"]) == 2
    assert "has no model (seen from" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    for text, message in (("", "config.yaml holds no configuration."), ("a: [", "config.yaml cannot be read: ")):
        (tmp_path / "config.yaml").write_text(text)
        assert main(["evaluate", f"{tmp_path}"]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(["experiment=image_vit_small", "data.path=images"])))
    assert main(["export", f"{tmp_path}", f"{tmp_path}/out"]) == 2
    assert "is of a run with data.name image_folder. Only models of text" in capsys.readouterr().err
    bare = shutil.copytree(runs / "text", tmp_path / "bare")
    shutil.rmtree(bare / "tokenizer")
    assert main(["generate", f"{bare}", "--prompt", "a"]) == 2
    assert "bare has no tokenizer: without it" in capsys.readouterr().err
    told = (runs / "vl" / "vision_language.json").read_text()
    try:
        (runs / "vl" / "vision_language.json").write_text("{}")
        assert main(["generate", f"{runs / 'vl'}", "--prompt", "a"]) == 2
        assert "vision_language.json cannot be used (KeyError: 'image_size')" in capsys.readouterr().err
    finally:
        (runs / "vl" / "vision_language.json").write_text(told)
    assert dm.load_model(runs / "vl" / "model").can_generate()


def test_answers_are_drawn_with_the_experts_that_fired(runs: Path, tmp_path: Path) -> None:
    """All held-out questions: what is drawn is what `Writer` writes, and shares are those of the paper's formula."""
    run = SavedRun(runs / "vl")
    for layer in run.layers.values():  # as after growth and pruning, in other slots than in the order of their ids
        layer.placement = Placement(expert_ids=(7, 2, 5, 0), next_id=9, ep_size=1)
    answers = draw_answers(run, tmp_path / "answers.png", num_answers=20)
    assert Image.open(tmp_path / "answers.png").width > 1000
    asked = json.loads((runs / "digits" / "learnt.json").read_text())
    images = runs / "digits" / "images"
    writer = Writer(run)
    by_question = {}
    for sample in asked:
        text, right = (turn["value"] for turn in sample["conversations"])
        ids = ids_of(writer, text)
        is_word = ids != run.model.config.image_token_id
        words = " ".join(writer.tokenizer.decode(ids[is_word], skip_special_tokens=True).split())
        by_question[tuple(images / file for file in images_of(sample)), words] = text, right, ids
    for answer in answers:
        text, right, ids = by_question[answer.images, answer.question]
        assert text.replace("<image>\n", "") in answer.question and answer.right == right
        assert [answer.given] == writer.write([Prompt(text=text, images=answer.images)], max_new_tokens=32)
        assert answer.experts == dict.fromkeys(run.layers, (0, 2, 5, 7)) and answer.fired.keys() == run.layers.keys()
        pixels = [read_picture(file, writer.form.image) for file in answer.images]
        for name, shares in fired(run, ids, pixels).items():
            np.testing.assert_allclose(answer.fired[name], shares, rtol=1e-12)
    assert len({len(answer.images) for answer in answers}) == 2, "image and text"
    assert any(answer.is_right for answer in answers) and not all(answer.is_right for answer in answers)


def ids_of(writer: Writer, text: str) -> Tensor:
    """The prompt [L]."""
    form = writer.form
    assert form is not None
    tokens = {"image_token_id": form.image_token_id, "tokens_per_image": form.image.num_tokens}
    return torch.tensor(encode_prompt(text, writer.tokenizer, form.template, **tokens))


@torch.no_grad()
def fired(run: SavedRun, ids: Tensor, pixels: list[Tensor]) -> dict[str, np.ndarray]:
    """By layer, which share of image tokens and of text tokens chose each expert, by id: [2, E].

    Where cos(x, w_e) is above G_e, or the expert with the greatest σ(cos(x, w_e)) − σ(G_e) if there is none.
    """
    hidden: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: hidden.update({name: given[0][0].double()}))
        for name, layer in run.layers.items()
    ]
    run.model(input_ids=ids[None], **({"pixel_values": torch.stack(pixels)} if pixels else {}))
    for hook in hooks:
        hook.remove()
    is_image = ids == run.model.config.image_token_id
    found = {}
    for name, layer in run.layers.items():
        slots = [slot for _, slot in sorted(layer.placement.slots_by_id.items())]
        weight, threshold = (getattr(layer.router, key).double()[slots] for key in ("weight", "threshold"))
        cosines = torch.nn.functional.cosine_similarity(hidden[name][:, None], weight, dim=2)
        margins = torch.sigmoid(cosines) - torch.sigmoid(threshold)
        best = torch.nn.functional.one_hot(margins.argmax(1), len(slots)).bool()
        chosen = torch.where((cosines > threshold).any(1, keepdim=True), cosines > threshold, best).double()
        found[name] = np.array([chosen[is_image].mean(0).numpy(), chosen[~is_image].mean(0).numpy()])
    return found


def test_held_out_text_alone_and_models_without_experts(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches of text alone bring an image in vain, as in training; and there are no bars to draw."""
    run = shutil.copytree(runs / "vl", tmp_path / "run")
    asked = json.loads((runs / "digits" / "learnt.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps([sample for sample in asked if "image" not in sample]))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"{runs}/digits/learnt.json", f"{tmp_path}/text.json"))
    assert main(["evaluate", f"{run}", "--answers", f"{tmp_path / 'text.png'}"]) == 0
    told = capsys.readouterr().out
    assert "eval/mean_k_per_kind/text text" in told and "eval/mean_k_per_kind/image" not in told
    shutil.rmtree(run / "model")
    dense = VisionLanguage(SavedRun(runs / "vl").config)
    dm.save_model(build_vision_language(dense.config, dense.backbone), run / "model")
    (run / "config.yaml").write_text(config)
    assert main(["evaluate", f"{run}", "--answers", f"{tmp_path / 'dense.png'}"]) == 0
    assert "eval/mean_k" not in capsys.readouterr().out and (tmp_path / "dense.png").exists()


def test_the_command_draws_answers_of_vision_language_runs_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"{runs / 'vl'}", "--answers", f"{tmp_path / 'a.png'}"]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert main(["evaluate", f"{runs / 'text'}", "--answers", f"{tmp_path / 'b.png'}"]) == 2
    assert "is no run of a vision-language model, so there are no answers to draw." in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()
    assert main(["evaluate", f"{runs / 'vl'}", "--answers", f"{tmp_path / 'gone' / 'c.png'}"]) == 2
    assert "cannot be written: there is no folder" in capsys.readouterr().err
    assert main(["evaluate", f"{runs / 'vl'}", "--answers", f"{tmp_path}"]) == 2
    assert "cannot be written: Is a directory." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vl", "text"])
def test_an_exported_model_writes_what_that_of_the_run_does(
    name: str, runs: Path, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = json.loads((runs / "digits" / "learnt.json").read_text())
    questions = [
        {
            "text": sample["conversations"][0]["value"],
            "images": [f"{runs}/digits/images/{file}" for file in images_of(sample)],
        }
        for sample in asked
    ]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(questions if name == "vl" else [{"text": "The "}, {"text": "and so it was that "}]))
    written = []
    for folder in (runs / name, exports / name):
        assert main(["generate", f"{folder}", "--file", f"{file}", "--tokens", "3"]) == 0
        written.append(capsys.readouterr())
    assert written[0].out == written[1].out and len(set(written[0].out.splitlines())) > 1
    assert f"using {exports / name}\n" in written[1].err


def test_an_exported_model_is_evaluated_as_that_of_the_run(
    runs: Path, exports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits, found = runs / "digits", []
    conversations = ["--held-out", f"{digits / 'learnt.json'}", "--image-folder", f"{digits / 'images'}", "--json"]
    for folder in (runs / "vl", exports / "vl"):
        assert main(["evaluate", f"{folder}", *conversations]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    want = logged(runs / "vl")  # on the same conversations
    del want["eval/forward_flops_per_token"], found[1]["eval/forward_flops_per_token"]
    assert found[1] == {key: pytest.approx(value, rel=1e-5) for key, value in want.items()}
    assert 0 < want["eval/exact_match"] < 1 and want["eval/mean_k"] > 1


def test_what_an_exported_model_cannot_do(
    runs: Path, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    what_helps = {"vl": "conversations to evaluate on with --held-out, or benchmarks", "text": "benchmarks"}
    for name, others in what_helps.items():
        said = " ".join(refused("evaluate", exports / name).split())
        assert (
            f"{exports / name} holds a model without its run, and so without data. Give {others} with --tasks;" in said
        )
    assert "holds a model without its run" in refused("evaluate", exports / "vl", "--answers", tmp_path / "a.png")
    held_out = ("--held-out", runs / "digits" / "learnt.json")
    assert "text holds a model of text. Conversations need" in refused("evaluate", exports / "text", *held_out)
    seen = refused("generate", exports / "text", "--prompt", "a", "--image", "b.png")
    assert "text holds a model of text, which sees no images." in seen
    assert "text is in Hugging Face's format already. Copy the folder; or" in refused(
        "export", exports / "text", tmp_path / "out"
    )
    copied = shutil.copytree(exports / "vl", tmp_path / "vl")
    (copied / "vision_language.json").unlink()
    assert "vl has no vision_language.json, which says how questions and" in refused(
        "generate", copied, "--prompt", "a"
    )
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert "vl has no tokenizer: without it, text is nothing" in refused("generate", copied, "--prompt", "a")
    (copied / "model.safetensors").write_bytes(b"cut off")
    said = refused("evaluate", copied)
    assert "vl holds no model that can be loaded (" in said and "Name a whole folder of `dynmoe export`" in said
    (copied / "config.json").write_text('{"model_type": "moe_llava_phi"}')
    assert "vl holds a model of type moe_llava_phi, which transformers does not know. `dynmoe import` reads" in refused(
        "generate", copied, "--prompt", "a"
    )
    assert "if it is a published checkpoint of DynMoE or MoE-LLaVA, run `dynmoe import` first" in refused(
        "export", copied, tmp_path / "out"
    )


@pytest.mark.parametrize("name", ["vl", "text"])
def test_an_exported_run_is_read_by_transformers(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"{runs / name}", f"{tmp_path / 'out'}"]) == 0
    told = capsys.readouterr().out
    assert "config.json, " in told and "model.safetensors" in told and "tokenizer.json" in told
    assert ("vision_language.json" in told) == (name == "vl")
    dm.register_auto_classes()
    auto = AutoModelForImageTextToText if name == "vl" else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, SavedRun(runs / name).model(input_ids=ids).logits)
    assert len(tokenizer) == model.config.get_text_config().vocab_size
    assert (" processor_config.json, " in told) == (name == "vl")
    assert main(["export", f"{runs / name}", f"{tmp_path / 'out'}"]) == 2
    assert "out exists and is not empty" in capsys.readouterr().err


def test_the_exported_processor_makes_the_same_of_questions_and_images(runs: Path, tmp_path: Path) -> None:
    """With the exported model it answers as `dynmoe generate`, to one question after the other and to many at once."""
    assert main(["export", f"{runs / 'vl'}", f"{tmp_path / 'out'}"]) == 0
    dm.register_auto_classes()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil", padding_side="left")

    def answers(batch: Any) -> list[str]:
        written = model.generate(**batch, max_new_tokens=3, do_sample=False)
        found: list[str] = processor.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    seen: list[tuple[str, list[Path], str]] = []
    writer = Writer(SavedRun(runs / "vl"))
    for sample in json.loads((runs / "digits" / "learnt.json").read_text()):
        text, files = sample["conversations"][0]["value"], [runs / "digits" / "images" / f for f in images_of(sample)]
        (want,) = writer.write([Prompt(text=text, images=tuple(files))], max_new_tokens=3)
        rendered = processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        batch = processor(text=rendered, images=[Image.open(file) for file in files] or None, return_tensors="pt")
        if files:
            wanted = [read_picture(file, writer.form.image) for file in files]
            assert torch.equal(batch["pixel_values"], torch.stack(wanted))
        assert answers(batch) == [want]
        seen.append((text, files, want))
    assert len({want for _, _, want in seen}) > 1
    chats = [
        [{"type": "image", "image": Image.open(*files)}, {"type": "text", "text": text.removeprefix("<image>\n")}]
        for text, files, _ in seen
        if files
    ]
    batch = processor.apply_chat_template(
        [[{"role": "user", "content": chat}] for chat in chats], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt", processor_kwargs={"padding": True},
    )  # fmt: skip
    assert answers(batch) == [want for _, files, want in seen if files]


def images_of(sample: dict[str, Any]) -> list[str]:
    return [sample["image"]] if "image" in sample else []


def test_a_tokenizer_that_cannot_have_the_image_token_is_exported_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "vl", tmp_path / "run")
    told = json.loads((run / "vision_language.json").read_text())
    assert told.pop("resample") == 3, "what is meant where an older run does not say it"
    (run / "vision_language.json").write_text(json.dumps(told))
    assert Writer(SavedRun(run)).form == Writer(SavedRun(runs / "vl")).form
    (run / "vision_language.json").write_text(json.dumps(told | {"image_token_id": 99}))
    assert main(["export", f"{run}", f"{tmp_path / 'out'}"]) == 0
    said = capsys.readouterr()
    assert "no processor for transformers is written. The tokenizer would give <image> the id 3, but" in said.err
    assert " processor_config.json" not in said.out and "tokenizer_config.json, vision_language.json" in said.out
