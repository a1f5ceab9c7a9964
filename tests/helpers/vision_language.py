"""A tiny vision-language run on handwritten digits, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.data.digit_questions import write_digit_questions

SIZES = (
    "model.vision_sizes.hidden_size=32", "model.vision_sizes.num_layers=2", "model.vision_sizes.ffn_hidden_size=32",
    "model.text_sizes.hidden_size=32", "model.text_sizes.num_layers=3", "model.text_sizes.ffn_hidden_size=32",
)  # fmt: skip

TINY = (
    "experiment=demo_vl", "parallel=single", "router=top_any", "adaptation=none", *SIZES,
    "training.steps=4", "training.eval_every_steps=4", "training.micro_batch_size=4", "training.log_every_steps=2",
    "optim.warmup_steps=1",
)  # fmt: skip


DATA = {"image_folder": "images", "path": "train.json", "held_out_path": "held_out.json", "tokenizer": "tokenizer"}


def write_digits(folder: Path) -> Path:
    """48 samples to learn from and 10 held out."""
    write_digit_questions(folder, num_train=48, num_held_out=10)
    return folder


def add_second_images(digits: Path) -> Path:
    """Let every other sample that asks once about a picture ask the same about the next such sample's, too."""
    for file in (digits / "train.json", digits / "held_out.json"):
        samples = json.loads(file.read_text())
        alone = [s for s in samples if "image" in s and len(s["conversations"]) == 2]
        for first, second in zip(alone[::2], alone[1::2], strict=False):
            first["image"] = [first["image"], second["image"]]
            first["conversations"] = [*first["conversations"], *second["conversations"]]
        file.write_text(json.dumps(samples))
    return digits


def empty_files(folder: Path) -> Path:
    """What `tiny_run` needs of data where no sample is read."""
    for name in DATA.values():
        (folder / name).mkdir(parents=True) if name == "images" else (folder / name).touch()
    return folder


def tiny_run(digits: Path, run_dir: Path, stage: str, *overrides: str) -> RunConfig:
    """Four steps of a stage: a decoder of three layers, of which 0 and 2 may have experts, and images of 16 tokens."""
    paths = [f"data.{key}={digits / name}" for key, name in DATA.items()]
    return load_config([*TINY, *paths, f"run_dir={run_dir}", f"stage=demo_{stage}", *overrides])
