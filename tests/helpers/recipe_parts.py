"""What a user of a vision-language recipe must have, in miniature: decoder, tokenizer, CLIP, images and LLaVA JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CodeGenTokenizer,
    GPT2Tokenizer,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    StableLmConfig,
)

from dynmoe_ds.models.random_weights import seeded_weights

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
NUM_LAYERS = 4
_END = "<|endoftext|>"
# Real folders have more rows of embeddings than their tokenizers have tokens.
_SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
# What sets StableLM-2-1.6B, Qwen1.5-1.8B and Phi-2 apart, as the configurations in their folders say.
DECODERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "stablelm": (StableLmConfig, {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "num_key_value_heads": 2}),
    "qwen": (Qwen2Config, {"num_key_value_heads": 2}),
    "phi": (PhiConfig, {"partial_rotary_factor": 0.4, "hidden_act": "gelu_new"}),
}
_TOKENIZERS: dict[str, Any] = {"stablelm": GPT2Tokenizer, "qwen": Qwen2Tokenizer, "phi": CodeGenTokenizer}


def decoder_config(name: str, **sizes: int) -> PreTrainedConfig:
    """The architecture of a recipe's decoder at small sizes; some of them changed."""
    kind, values = DECODERS[name]
    return kind(**_SIZES | values | sizes)


def write_recipe_parts(folder: Path, *names: str) -> Path:
    """`images`, `captions.json`, `instructions.json`, `mix.json`, `held_out.json`, `clip`, and the named decoders."""
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, colour in enumerate([*COLOURS.values()] * 2):
        pixels = np.array(colour) + rng.integers(-30, 30, (10 + number, 12, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number}.png")
    for file, samples in _conversations().items():
        (folder / file).write_text(json.dumps(samples))
    _write_clip(folder / "clip")
    for name in names:
        with seeded_weights(0):
            AutoModelForCausalLM.from_config(decoder_config(name)).save_pretrained(folder / name)
        _TOKENIZERS[name](tokenizer_object=_bytes(), eos_token=_END).save_pretrained(folder / name)
    return folder


def recipe_overrides(folder: Path, name: str) -> list[str]:
    """The command of docs/vision_language.md with these parts; the stages' data are of one stage each."""
    return [
        f"experiment=moe_llava_{name}",
        f"model.vision_pretrained={folder / 'clip'}",
        f"model.text_pretrained={folder / name}",
        f"data.tokenizer={folder / name}",
        f"data.image_folder={folder / 'images'}",
        f"data.held_out_path={folder / 'held_out.json'}",
        f"projector:data.path={folder / 'captions.json'}",
        f"language:data.path={folder / 'instructions.json'}",
        f"experts:data.path={folder / 'mix.json'}",
    ]


def _conversations() -> dict[str, list[dict[str, Any]]]:
    def said(*turns: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]

    names = [*COLOURS] * 2
    captions = [
        {"id": f"c{i}", "image": f"{i}.png", "conversations": said("<image>\nDescribe it.", f"A {name} picture.")}
        for i, name in enumerate(names)
    ]
    asked = [
        {
            "id": f"i{i}",
            "image": f"{i}.png",
            "conversations": said("<image>\nWhat colour is it?", f"It is {name}.", "Is it blue?", "That I told you."),
        }
        for i, name in enumerate(names)
    ]
    texts = [
        {"id": f"t{i}", "conversations": said(f"How many letters has {name}?", f"It has {len(name)} letters.")}
        for i, name in enumerate(names)
    ]
    return {
        "captions.json": captions,
        "instructions.json": [*asked, *texts],
        "mix.json": [*texts, *asked],
        "held_out.json": [asked[0], captions[1], texts[2]],
    }


def _write_clip(folder: Path) -> None:
    """A whole CLIP, as its folders hold, for images of 336 pixels, with 16 patches instead of 576."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with seeded_weights(0):
        CLIPModel(
            CLIPConfig(
                text_config=sizes | {"vocab_size": 100}, vision_config=sizes | {"image_size": 336, "patch_size": 84}
            )
        ).save_pretrained(folder)
    square = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=square).save_pretrained(folder)


def _bytes() -> Tokenizer:
    """A byte-level BPE, like those of the three decoders, without an image token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (turn["value"] for samples in _conversations().values() for s in samples for turn in s["conversations"])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=[_END], initial_alphabet=alphabet)
    )
    return tokenizer
