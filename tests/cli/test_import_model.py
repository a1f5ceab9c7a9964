"""`dynmoe import`, and what the other verbs do with its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.helpers.published import published_config, published_tensors, tower, write_published, write_tower
from torch import Tensor
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

import dynmoe_ds as dm
from dynmoe_ds.cli.main import main
from dynmoe_ds.data import END_OF_TEXT, train_tokenizer
from dynmoe_ds.harness.model_folder import load_model_folder
from dynmoe_ds.moe import StepLedger

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
QUESTION, NUM_TOKENS, VOCAB = "<image>\nWhich one?", 4, 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published checkpoint, its CLIP, a tokenizer, an image, and the two imported."""
    folder = tmp_path_factory.mktemp("import")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer([SYSTEM * 9, "USER: Which one? ASSISTANT: this, that"], VOCAB),
        eos_token=END_OF_TEXT,
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 256}
    config = published_config("stablelm", **sizes)
    write_published(folder / "published", published_tensors("stablelm", **sizes), config)
    write_tower(folder / "clip", tower())
    generator = torch.Generator().manual_seed(4)
    noise = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "noise.png")
    common = ["import", f"{folder}/published", "--tokenizer", f"{folder}/tokenizer"]
    assert main([*common[:2], f"{folder}/seeing", *common[2:], "--vision-tower", f"{folder}/clip"]) == 0
    assert main([*common[:2], f"{folder}/text", *common[2:], "--text-only"]) == 0
    return folder


def question(folder: Path) -> tuple[Any, Any, Tensor, Tensor]:
    """Model, tokenizer, and the prompt's ids [1, L] and pixels, made by hand."""
    model: Any = dm.import_published_model(folder / "published", folder / "clip")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    before, after = (tokenizer(text)["input_ids"] for text in (f"{SYSTEM}USER: ", "\nWhich one? ASSISTANT:"))
    image_processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
    pixels = image_processor(Image.open(folder / "noise.png"), return_tensors="pt")["pixel_values"]
    return model, tokenizer, torch.tensor([before + [model.config.image_token_id] * 4 + after]), pixels


def test_generate_answers_about_an_image_as_by_hand(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy decoding without a cache writes the same."""
    model, tokenizer, ids, pixels = question(folders)
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids, pixel_values=pixels).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.eos_token_id not in ids[0, -NUM_TOKENS:], "the loop has no end"
    command = ["--prompt", QUESTION, "--image", f"{folders}/noise.png", "--tokens", f"{NUM_TOKENS}"]
    assert main(["generate", f"{folders}/seeing", *command]) == 0
    assert capsys.readouterr().out == tokenizer.decode(ids[0, -NUM_TOKENS:]) + "\n"
    assert main(["generate", f"{folders}/text", "--prompt", "Which", "--tokens", "2"]) == 0
    assert main(["export", f"{folders}/seeing", f"{folders}/exported"]) == 0
    assert "processor_config.json" in capsys.readouterr().out


def test_evaluate_takes_conversations(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "questions.json"
    samples = [
        {"id": kind, "kind": kind, "image": "noise.png", "conversations": [
            {"from": "human", "value": QUESTION}, {"from": "gpt", "value": "other words"}]}
        for kind in ("this", "that")
    ]  # fmt: skip
    file.write_text(json.dumps(samples))
    command = ["evaluate", f"{folders}/seeing", "--held-out", f"{file}", "--image-folder", f"{folders}"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["eval/exact_match"] == found["eval/exact_match/this"] == 0
    model, tokenizer, ids, pixels = question(folders)
    right = tokenizer(f" other words{END_OF_TEXT}", return_tensors="pt")["input_ids"]
    with torch.no_grad(), StepLedger(evaluation=True) as ledger:
        logits = model(input_ids=torch.cat([ids, right], 1), pixel_values=pixels).logits[0, ids.shape[1] - 1 : -1]
    want = -logits.log_softmax(1).gather(1, right.T).mean()
    assert found["eval/loss"] == pytest.approx(float(want), rel=1e-4)
    layers = [record.mean_k for record in ledger.records().values()]
    assert found["eval/mean_k"] == pytest.approx(sum(layers) / len(layers)) and len(set(layers)) > 1
    of_kinds = {kind: found[f"eval/mean_k_per_kind/{kind}"] for kind in ("image this", "text this")}
    assert min(of_kinds.values()) < found["eval/mean_k"] < max(of_kinds.values())
    assert found["eval/mean_k_per_kind/image that"] == of_kinds["image this"], "the same question"
    assert 0 < found["eval/active_parameters"] < sum(param.numel() for param in model.parameters())
    assert main(["evaluate", f"{folders}/text", "--held-out", f"{file}"]) == 2
    assert "text holds a model of text. Conversations need a vision-language model." in capsys.readouterr().err


def test_benchmarks_find_the_model(folders: Path) -> None:
    model, tokenizer = load_model_folder(folders / "text", None, "cpu")
    assert model.config.model_type == "stablelm" and tokenizer.eos_token == END_OF_TEXT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--held-out", "a", "--tasks", "arc_easy"],
            "--held-out takes the place of a run's own data. Leave out --tasks",
        ),
        (["--held-out", "a", "--answers", "b.png"], "--held-out takes the place of a run's own data."),
        (["--image-folder", "a"], "--image-folder belongs to --held-out."),
        ([], "seeing holds a model without its run, and so without data. Give conversations to evaluate on with"),
        (["--answers", "b.png"], "seeing holds a model without its run, and so without data."),
    ],
)
def test_evaluations_that_cannot_work(
    arguments: list[str], message: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"{folders}/seeing", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_imported(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = shutil.copytree(folders / "published", tmp_path / "published")
    tokenizer = ["--tokenizer", f"{folders}/tokenizer"]
    seeing = [*tokenizer, "--vision-tower", f"{folders}/clip"]

    def refused(*arguments: str) -> str:
        assert main(["import", f"{published}", f"{tmp_path}/new", *arguments]) == 2
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err

    assert "published has no tokenizer.json: it has no tokenizer, or one that only its authors'" in refused(
        "--text-only"
    )
    assert "vision-language model that sees by openai/clip-vit-large-patch14-336, which" in refused(*tokenizer)
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": "square"}))
    assert "image_aspect_ratio is 'square' in" in refused(*seeing)
    (published / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    assert "has ids up to 299, but the model knows 256. Use the model's own." in refused(*seeing)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").touch()
    assert main(["import", f"{published}", f"{tmp_path}/new", *seeing]) == 2
    assert "new exists and is not empty" in capsys.readouterr().err
    (published / "config.json").write_text(json.dumps(config))
    assert main(["import", f"{published}", f"{tmp_path}/new/a/b", *seeing]) == 2
    assert "The model cannot be written to" in capsys.readouterr().err
