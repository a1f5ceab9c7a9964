"""Vision-language training in stages, on one rank and on several."""

from __future__ import annotations

import json
import logging
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.helpers.no_report import draw_no_report
from tests.helpers.run_config import small_run
from tests.helpers.spawn import allow_workers, run_ranks
from tests.helpers.vision_language import add_second_images, tiny_run, write_digits
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import dynmoe_ds as dm
from dynmoe_ds.data import ImageInput, read_picture
from dynmoe_ds.data.chat import IGNORED, encode_prompt
from dynmoe_ds.errors import CheckpointError, ConfigError, DataError
from dynmoe_ds.models import build_decoder, build_vision_language, vision_language
from dynmoe_ds.models.random_weights import seeded_weights
from dynmoe_ds.moe import MoELayer
from dynmoe_ds.training import Trainer
from dynmoe_ds.training.saved_run import SavedRun
from dynmoe_ds.training.tasks import VisionLanguage
from dynmoe_ds.training.writer import Prompt, Writer

_OF_RANKS = ("moe/rank_imbalance", "moe/sent_row_bytes", "moe/least_row_bytes", "moe/sent_metadata_bytes")
TEXT_MODEL, PROJECTOR = "model.language_model.", "multi_modal_projector"
GROWTH = ["adaptation=paper", "adaptation.every_steps=2", "adaptation.window_steps=1", "adaptation.last_growth_step=2"]
STAGES = {
    "projector": [],
    "language": ["stage.trained=[vision_tower,projector,language_model]"],
    "experts": ["model.num_experts=3", "model.num_slots=4", *GROWTH],
    "packed": ["model.num_slots=4", "data.packing=true"],
}
WITH_EXPERTS = ("experts", "packed")
# Of the tower, whose features are taken before its last layer.
UNUSED = ("model.vision_tower.encoder.layers.1.", "model.vision_tower.post_layernorm.")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_second_images(write_digits(tmp_path_factory.mktemp("vision_language") / "digits"))


def train_stages(
    rank: int, world_size: int, digits: str, folder: str, alone: str, ep_size: int, zero_stage: int, stages: list[str]
) -> list[Any]:
    """Stages, eight samples a step one by one, so that ranks have no, one and two images at the same time.

    One starts from the model of the stage before it, or from one rank's in `alone` if that stage is not trained here.
    Of every stage: how many images this rank had, micro step by micro step, and what its optimiser holds.
    """
    allow_workers()
    draw_no_report()
    found = []
    for before, stage in pairwise(["", *STAGES]):
        if stage not in stages:
            continue
        start = [f"stage.start={folder if before in stages else alone}/{before}/model"] if before else []
        workers = ["data.num_workers=1"] if (stage, world_size) == ("projector", 2) else []
        config = tiny_run(
            Path(digits), Path(folder) / stage, stage.replace("packed", "experts"), *STAGES[stage], *start, *workers,
            f"parallel.num_ranks={world_size}", f"parallel.ep_size={ep_size}", f"parallel.zero_stage={zero_stage}",
            "training.micro_batch_size=1", "training.log_every_steps=1",
            f"training.gradient_accumulation_steps={8 // world_size}", "data.group=false",
        )  # fmt: skip
        trainer = Trainer(config)
        assert (trainer.task.train.rows is not None) == (stage == "packed")
        examples, order = trainer.task.train, trainer.training_order
        places = [(step, micro) for step in range(4) for micro in range(8 // world_size)]
        num_images = [sum(len(s.images) for s in examples.job(order.indices(*place)).rows[0]) for place in places]
        trainer.run()
        trained = {name for name, param in trainer.engine.module.named_parameters() if param.requires_grad}
        found.append((num_images, trained))
    return found


# Ranks, EP, ZeRO, stages.
LAYOUTS = {
    "EP 2": (2, 2, 2, [*STAGES]),
    "ZeRO 3": (2, 1, 3, ["projector", "experts"]),
    "EP 2 x EDP 2, ZeRO 3": (4, 2, 3, [*STAGES]),
}


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(train_stages, 1, f"{digits}", f"{folder}", "", 1, 2, [*STAGES], timeout_s=200)
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def part_of(name: str) -> str:
    """The part of the model that a parameter is of; the router's or the experts' where it is theirs."""
    if name.startswith((TEXT_MODEL, "lm_head.")):
        return next((part for part in ("router", "experts") if f".{part}." in name), "language_model")
    return name.split(".")[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.timeout(400)
def test_every_layout_trains_like_one_rank(layout: str, digits: Path, alone: Path, tmp_path: Path) -> None:
    world_size, *how, stages = LAYOUTS[layout]
    found = run_ranks(train_stages, world_size, f"{digits}", f"{tmp_path}", f"{alone}", *how, stages, timeout_s=300)
    for number, stage in enumerate(stages):
        at_once = list(zip(*(of_rank[number][0] for of_rank in found), strict=True))
        if stage != "packed":  # where rows have both
            uneven = {0, 1, 2} if world_size == 4 else {0, 2}
            assert any(set(numbers) == uneven for numbers in at_once), "ranks never differ so in what they see"
        (first, *_, got), (first_alone, *_, want) = metrics(tmp_path / stage), metrics(alone / stage)
        parts = {"projector": {PROJECTOR}, "language": {"vision_tower", PROJECTOR, "language_model"}}
        for trained in (of_rank[number][1] for of_rank in found):
            assert {part_of(name) for name in trained} == parts.get(stage, {"router", "experts"})
        nearness = 2e-5 if stage == "projector" else 1e-3
        for name in ("train/loss", "train/gradient_norm"):
            assert first[name] == pytest.approx(first_alone[name], rel=nearness), (stage, name)
        for name in ("train/loss", "eval/loss"):
            assert got[name] == pytest.approx(want[name], rel=1e-3), (stage, name)
        assert got["eval/exact_match"] == want["eval/exact_match"]
        assert {name for name in got if not name.startswith(_OF_RANKS)} == set(want), "kinds of tokens included"
        assert got.get("eval/mean_k") == pytest.approx(want.get("eval/mean_k"), abs=0.03)
        assert ("eval/mean_k_per_kind/image which" in got) == (stage in WITH_EXPERTS)
    changes = adaptations(tmp_path / "experts")
    assert changes == adaptations(alone / "experts")
    assert [(step, grown) for step, _, grown, _ in changes if grown] == [(2, [3]), (2, [3])], "in the middle of the run"


def adaptations(folder: Path) -> list[tuple[int, str, list[int], list[int]]]:
    """Step, layer and ids of the experts that were born and of those that were pruned."""
    events = map(json.loads, (folder / "adaptation.jsonl").read_text().splitlines())
    return [
        (event["step"], layer, [expert["expert_id"] for expert in change["grown"]], change["pruned"])
        for event in events
        for layer, change in event["layers"].items()
    ]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def test_each_stage_starts_from_the_last_and_changes_what_it_trains_alone(digits: Path, alone: Path) -> None:
    config = tiny_run(digits, Path("never"), "projector")
    before = weights(build_vision_language(config, VisionLanguage(config).backbone))
    layers = [f"{TEXT_MODEL}layers.{index}.mlp." for index in (0, 2)]
    trained = {"projector": ("model.multi_modal_projector.",)}
    trained["language"] = (*trained["projector"], "model.vision_tower.", TEXT_MODEL, "lm_head.")
    for stage in WITH_EXPERTS:
        trained[stage] = tuple(f"{layer}{part}." for layer in layers for part in ("router", "experts"))
    for stage in STAGES:
        model = dm.load_model(alone / stage / "model")
        after = weights(model)
        for name, weight in after.items():
            is_trained = name.startswith(trained[stage]) and not name.startswith(UNUSED)
            if name in before:
                assert torch.equal(weight, before[name]) != is_trained, (stage, name)
            else:
                assert stage == "experts" and is_trained, name
        for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
            assert stage in WITH_EXPERTS and 3 in layer.placement.live_ids
        if stage == "experts":  # which were copies of the second stage's FFNs, four small steps before
            moved = (after[f"{layers[0]}experts.w1"] - before[f"{layers[0]}gate_proj.weight"]).abs().max()
            assert 0 < moved < 0.05
        before = after


def test_exact_match_is_what_greedy_decoding_says(digits: Path, tmp_path: Path) -> None:
    """Of the trained model and of the saved one, with a cache and without, to prompts of unequal length."""
    overrides = ["training.steps=60", "training.micro_batch_size=16", "training.eval_every_steps=60", "optim.lr=5e-3"]
    # Of what it has learnt it gets a part right.
    learnt = json.loads((digits / "train.json").read_text())
    asked_once = [sample for sample in learnt if len(sample["conversations"]) == 2]
    (tmp_path / "learnt.json").write_text(json.dumps(asked_once))
    overrides.append(f"data.held_out_path={tmp_path}/learnt.json")
    everything = "stage.trained=[vision_tower,projector,language_model]"
    run_ranks(run_on_a_rank, 1, f"{digits}", f"{tmp_path}/run", "experts", [*overrides, everything], timeout_s=200)
    told = metrics(tmp_path / "run")[-1]
    held_out = VisionLanguage(tiny_run(digits, Path("never"), "experts", *overrides)).data.held_out
    model = dm.load_model(tmp_path / "run" / "model")
    is_exact = []
    for index in range(len(held_out)):
        batch = held_out.batch([index])
        first = int((batch["labels"][0] != IGNORED).nonzero()[0])
        prompt = {name: batch[name][:, :first] for name in ("input_ids", "attention_mask")}
        answer = batch["labels"][0, first:]
        written = [
            model.generate(**prompt, **images(batch), max_new_tokens=len(answer), do_sample=False, use_cache=use_cache)[
                0, first:
            ]
            for use_cache in (True, False)
        ]
        assert torch.equal(*written)
        is_exact.append(written[0].tolist() == answer.tolist())
    assert told["eval/exact_match"] == sum(is_exact) / len(is_exact)
    assert 0 < sum(is_exact) < len(is_exact), "nothing to tell apart"
    by_kind: dict[str, list[bool]] = {}
    for sample, right in zip(held_out.samples, is_exact, strict=True):
        by_kind.setdefault(str(sample.kind), []).append(right)
    assert len(by_kind) == 5
    for kind, right in by_kind.items():
        assert told[f"eval/exact_match/{kind}"] == sum(right) / len(right)
        assert f"eval/mean_k_per_kind/text {kind}" in told
        assert (f"eval/mean_k_per_kind/image {kind}" in told) == (kind != "text")


def images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pictures that tokens stand for, as an argument; none for text alone."""
    return {"pixel_values": batch["pixel_values"]} if batch["pixel_values"].any() else {}


def run_on_a_rank(rank: int, world_size: int, digits: str, run_dir: str, stage: str, overrides: list[str]) -> None:
    Trainer(tiny_run(Path(digits), Path(run_dir), stage, *overrides)).run()


def train_with_siglip(rank: int, world_size: int, digits: str, folder: str) -> list[str]:
    """Four steps of all parts and of experts on a SigLIP tower; the names of what a rank's optimiser holds."""
    draw_no_report()
    config = tiny_run(
        Path(digits), Path(folder) / "run", "experts", *STAGES["experts"], *STAGES["language"],
        f"model.vision_pretrained={folder}/siglip", "model.vision_sizes=null", "optim.lr=1e-2",
        f"parallel.num_ranks={world_size}", f"parallel.ep_size={world_size}", "parallel.zero_stage=2",
        "training.micro_batch_size=2", "training.log_every_steps=1",
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.run()
    return [name for name, param in trainer.engine.module.named_parameters() if param.requires_grad]


def test_a_run_on_a_siglip_tower_is_trained_evaluated_and_asked(digits: Path, tmp_path: Path) -> None:
    """Unlike CLIP it has no token of its own before the patches, another norm for images, and a head that is unused."""
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with seeded_weights(0):
        tower = SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=32))
    tower.save_pretrained(tmp_path / "siglip")
    for trained in run_ranks(train_with_siglip, 2, f"{digits}", f"{tmp_path}", timeout_s=200):
        assert {part_of(name) for name in trained} >= {"vision_tower", PROJECTOR, "language_model", "experts"}
    run = SavedRun(tmp_path / "run")
    model: Any = run.model
    assert type(model.model.vision_tower) is SiglipVisionModel
    was, is_now = weights(tower), weights(model.model.vision_tower)
    changed = {name for name, weight in is_now.items() if not torch.equal(weight, was[name])}
    is_unused = ("encoder.layers.1.", "post_layernorm.", "head.")
    assert changed and not {name for name in changed if name.startswith(is_unused)}
    # Attention does not depend on the keys' biases: their gradients are rounding noise.
    used = {name for name in was if not name.startswith(is_unused) and not name.endswith("k_proj.bias")}
    assert used <= changed, used - changed
    told = metrics(run.folder)[-1]
    found = {metric.name: metric.value for metric in run.evaluate()}
    for name in ("eval/loss", "eval/exact_match", "eval/mean_k"):
        assert found[name] == pytest.approx(told[name], rel=1e-4), name

    # Asked with a loop that has no cache, by the image that SigLIP's own processor makes.
    writer = Writer(run)
    file, other = sorted((digits / "images").glob("which-*.png"))[:2]  # which are square
    assert writer.form is not None and writer.form.image.mean == writer.form.image.std == (0.5, 0.5, 0.5)
    own = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    pixels = own(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(read_picture(file, writer.form.image)[None], pixels)
    question = "<image>\nWhich digit is this?"
    (answer,) = writer.write([Prompt(text=question, images=(file,))], max_new_tokens=4)
    ids = torch.tensor([encode_prompt(question, writer.tokenizer, writer.form.template,
                                      image_token_id=writer.form.image_token_id, tokens_per_image=16)])  # fmt: skip
    processor: Any = writer.processor()
    rendered = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    exported = processor(text=rendered, images=[Image.open(file)], return_tensors="pt")
    assert torch.equal(exported["input_ids"], ids)
    torch.testing.assert_close(exported["pixel_values"], pixels)
    seen = []
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + 4 and ids[0, -1] != writer.tokenizer.eos_token_id:
            logits = model(input_ids=ids, pixel_values=pixels).logits[:, -1:]
            seen.append(logits)
            ids = torch.cat([ids, logits.argmax(-1)], 1)
        elsewhere = read_picture(other, writer.form.image)[None]
        assert not torch.allclose(model(input_ids=ids[:, :start], pixel_values=elsewhere).logits[:, -1:], seen[0])
    assert answer == writer.tokenizer.decode(ids[0, start:], skip_special_tokens=True) != ""


def test_the_run_folder_says_how_images_become_input(digits: Path, alone: Path) -> None:
    told = json.loads((alone / "projector" / "vision_language.json").read_text())
    assert (told["image_size"], told["tokens_per_image"], told["image_token_id"]) == (32, 16, 3)
    assert len(told["mean"]) == len(told["std"]) == 3
    assert (alone / "projector" / "tokenizer" / "tokenizer.json").exists()


def test_images_are_normalised_as_the_towers_folder_says(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Or as is usual; the log says which, and the run folder what."""
    caplog.set_level("INFO", "dynmoe_ds")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = tmp_path / "tower"
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(tower)
    overrides = [f"model.vision_pretrained={tower}", "model.vision_sizes=null"]

    def image() -> tuple[ImageInput, str]:
        caplog.clear()
        task = VisionLanguage(tiny_run(digits, Path("never"), "projector", *overrides))
        task.write_files(tmp_path)
        told = json.loads((tmp_path / "vision_language.json").read_text())
        assert (tuple(told["mean"]), told["resample"]) == (task.image.mean, task.image.resample)
        return task.image, caplog.text

    usual, said = image()
    assert usual.mean == (0.48145466, 0.4578275, 0.40821073) and usual.resample == 3
    assert "Images are normalised as is usual for a clip_vision_model." in said
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=square, image_mean=[0.1, 0.2, 0.3], resample=2
    ).save_pretrained(tower)
    own, said = image()
    assert own.mean == (0.1, 0.2, 0.3) and own.std == usual.std and own.resample == 2
    assert f"Images are normalised as {tower} says." in said
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=40).save_pretrained(tower)
    with pytest.raises(ConfigError, match=r"crop_size is .*40.*, but data.image_size is 32. Correct it, or take it"):
        image()


def test_a_start_that_does_not_fit_is_refused(digits: Path, alone: Path, tmp_path: Path) -> None:
    start = f"stage.start={alone / 'language' / 'model'}"
    with pytest.raises(ConfigError, match=r"whose image_seq_length is 16, but the sections model and data make it 25"):
        VisionLanguage(tiny_run(digits, tmp_path / "a", "experts", start, "data.image_size=40")).build_model()
    with pytest.raises(ConfigError, match=r"whose text_config.hidden_size is 32, but the sections model and data make"):
        VisionLanguage(
            tiny_run(digits, tmp_path / "b", "experts", start, "model.text_sizes.hidden_size=64")
        ).build_model()
    experts = f"stage.start={alone / 'experts' / 'model'}"
    with pytest.raises(ConfigError, match=r"whose routers are TopAnyConfig.*but the section router says TopKConfig"):
        VisionLanguage(tiny_run(digits, tmp_path / "d", "experts", experts, "router=top_k")).build_model()
    llama = tmp_path / "llama"
    dm.save_model(build_decoder(small_run(), 60, eos_token_id=2), llama)
    with pytest.raises(ConfigError, match=r"which holds a LlamaForCausalLM where a Llava is needed"):
        VisionLanguage(tiny_run(digits, tmp_path / "e", "experts", f"stage.start={llama}")).build_model()
    decoder = tmp_path / "decoder"
    dm.save_model(dm.load_model(alone / "language" / "model").model.language_model, decoder)
    with pytest.raises(CheckpointError, match=r"describes a LlamaModel, but load_model builds transformers'"):
        VisionLanguage(tiny_run(digits, tmp_path / "c", "experts", f"stage.start={decoder}")).build_model()


def test_the_log_says_what_is_padding(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for packing in ("false", "true"):
            VisionLanguage(tiny_run(digits, tmp_path / "run", "projector", f"data.packing={packing}")).build_model()
    alone, packed = [message for message in caplog.messages if "adding is" in message]
    (share,) = re.fullmatch(r"Padding is (.*) % of a batch's tokens", alone).groups()
    found = re.fullmatch(
        r"48 samples are packed into (\d+) rows: padding is (.*) % of .*, (.*) % without packing", packed
    )
    assert found is not None and found[3] == share
    assert int(found[1]) < 30 and 0 < float(found[2]) < 100


def test_a_decoder_that_may_mix_packed_samples_is_refused(digits: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(vision_language, "PACKABLE", ("phi",))
    task = VisionLanguage(tiny_run(digits, tmp_path / "run", "projector", "data.packing=true"))
    with pytest.raises(ConfigError, match=r"is of type llama. Samples in one row are known to stay apart in phi. Set"):
        task.build_model()


def test_the_log_says_what_trains(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = {
        "projector": r"Training projector: .*, which are 1 x model.multi_modal_projector.linear_1.weight, .*",
        "language": r"Training projector, language_model: .* 3 x model.language_model.layers.\*.mlp.up_proj.weight, .*",
        "experts": r"Training experts: .*, which are 2 x model.language_model.layers.\*.mlp.experts.w1, .*",
    }
    for stage, pattern in wanted.items():
        overrides = ["stage.trained=[projector,language_model]"] if stage == "language" else STAGES[stage]
        caplog.clear()
        with caplog.at_level(logging.INFO):
            model = VisionLanguage(tiny_run(digits, tmp_path / "run", stage, *overrides)).build_model()
        (line,) = [message for message in caplog.messages if message.startswith("Training ")]
        assert re.fullmatch(pattern, line)
        params = list(model.parameters())
        trained = sum(param.numel() for param in params if param.requires_grad) / 1e6
        total = sum(param.numel() for param in params) / 1e6
        assert f": {trained:.2f}M of {total:.2f}M parameters on this rank, which" in line and trained < total
        told = re.findall(r"(\d+) x ", line)
        assert sum(map(int, told)) == sum(param.requires_grad for param in params)


def test_an_evaluation_of_a_dense_run_gives_its_parameters(digits: Path, alone: Path) -> None:
    """All of them, at the end of the run and afterwards; none at the steps between, where they would never change."""
    run = SavedRun(alone / "language")
    found = {metric.name: metric.value for metric in run.evaluate()}
    assert found["eval/active_parameters"] == sum(param.numel() for param in run.model.parameters())
    first, *_, last = metrics(alone / "language")
    for name in ("eval/active_parameters", "eval/forward_flops_per_token"):
        assert found[name] == last[name] > 0 and name not in first
    assert not any(name.startswith("moe/") for name in last)


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in (digits / "tokenizer").iterdir():
        values = file.read_text()
        if file.name == "tokenizer_config.json":
            values = json.dumps({k: v for k, v in json.loads(values).items() if k != "eos_token"})
        (folder / file.name).write_text(values)
    with pytest.raises(DataError, match=r"data.tokenizer names no end-of-text token \(eos_token\)"):
        VisionLanguage(tiny_run(digits, tmp_path / "run", "experts", f"data.tokenizer={folder}"))
