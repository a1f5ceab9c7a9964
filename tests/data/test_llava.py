"""Conversations about images as a model's input."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dynmoe_ds.config.schema import LlavaDataConfig
from dynmoe_ds.data import ConversationData, ImageInput, load_conversations, load_pretrained_tokenizer
from dynmoe_ds.data.chat import IGNORED
from dynmoe_ds.data.digit_questions import digit_tokenizer
from dynmoe_ds.data.image_transforms import padded_to_square
from dynmoe_ds.errors import DataError

IMAGE = ImageInput(size=8, num_tokens=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


SAMPLES: list[dict[str, Any]] = [
    {"id": "a", "image": "white.png", "conversations": said("<image>\nWhich digit is this?", "seven"), "kind": "which"},
    {"id": "b", "conversations": said("What is three plus four?", "seven"), "kind": "text"},
    {"id": "c", "image": ["red.png", "white.png"], "conversations": said("<image> <image>\nWhich digit?", "one")},
]  # fmt: skip


def load(folder: Path, samples: list[dict[str, Any]] = SAMPLES, **values: Any) -> ConversationData:
    for name in ("train", "held_out"):
        (folder / f"{name}.json").write_text(json.dumps(samples if name == "train" else SAMPLES[:1]))
    settings: dict[str, Any] = {
        "path": f"{folder / 'train.json'}",
        "held_out_path": f"{folder / 'held_out.json'}",
        "image_folder": f"{folder}",
        "tokenizer": f"{folder / 'tokenizer'}",
        "template": "own",
        "image_size": 8,
        "sequence_length": 64,
        "on_broken": "stop",
        "group": True,
    }
    config = LlavaDataConfig(**settings | values)
    tokenizer = load_pretrained_tokenizer(config.tokenizer)
    return load_conversations(
        config, tokenizer, IMAGE, tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id
    )


def test_a_batch_is_what_the_json_says(folder):
    data = load(folder)
    tokenizer = digit_tokenizer()
    batch = data.train.batch([1, 2, 0])
    ids, labels = batch["input_ids"], batch["labels"]
    image, pad = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id
    lengths = batch["attention_mask"].sum(1)
    assert lengths.tolist() == [data.train.length(i) for i in (1, 2, 0)]
    assert ids.shape[1] == max(lengths) and (ids[~batch["attention_mask"]] == pad).all()
    assert (ids == image).sum(1).tolist() == [0, 8, 4], "four tokens for every image"
    learned = [tokenizer.decode(row[row != IGNORED]) for row in labels]
    assert learned == ["seven</s>", "one</s>", "seven</s>"]
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
    (said_to_b,) = [tokenizer.decode(ids[0, : lengths[0]])]
    assert said_to_b.startswith("Q: What is three plus four?") and said_to_b.endswith("seven</s>")

    pixels = batch["pixel_values"]
    assert pixels.shape == (3, 3, 8, 8), "images in the order of their tokens: red, white, white"
    assert (pixels[1:] == 1).all()
    grey, red = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, -1.0, -1.0])
    assert torch.allclose(pixels[0, :, 0, 0], grey, atol=0.01), "above the red part, of the mean colour"
    assert torch.allclose(pixels[0, :, 4, 4], red, atol=0.01)

    kinds = [data.train.token_kinds[kind] if kind >= 0 else None for kind in batch["token_kinds"][2].tolist()]
    assert kinds[: lengths[2]] == ["image which" if i == image else "text which" for i in ids[2, : lengths[2]]]
    assert set(kinds[lengths[2] :]) <= {None}
    assert data.train.token_kinds == ("text", "image", "text text", "image text", "text which", "image which")


def test_a_batch_of_text_brings_an_image_in_vain(folder):
    batch = load(folder).train.batch([1, 1])
    assert batch["pixel_values"].shape == (1, 3, 8, 8) and not batch["pixel_values"].any()


def test_what_a_step_holds_goes_by_images_and_length(folder):
    grouping = load(folder).train.grouping()
    assert grouping.kinds.tolist() == [True, False, True]
    assert grouping.lengths.tolist() == [load(folder).train.length(i) for i in range(3)]


BROKEN = [
    {"id": "gone", "image": "gone.png", "conversations": said("<image>", "one")},
    {"id": "long", "image": "white.png", "conversations": said("<image>" + " is" * 60, "one")},
    {"id": "silent", "conversations": []},
]


def test_broken_samples_are_counted_and_left_out_on_request(folder, caplog):
    with caplog.at_level(logging.WARNING):
        data = load(folder, [*SAMPLES, *BROKEN], on_broken="skip")
    assert [sample.name for sample in data.train.samples] == ["a", "b", "c"]
    assert len(data.broken) == 3
    assert "3 samples are left out." in caplog.text
    for words in ("1 x an image is missing: gone", "1 x longer than data.sequence_length (64): long (", "silent"):
        assert words in caplog.text


def test_broken_samples_stop_the_run_by_default(folder):
    with pytest.raises(DataError, match=r"2 of 5 samples in .*train.json cannot be used.\n(.*\n)*Repair them"):
        load(folder, [*SAMPLES, BROKEN[0], BROKEN[2]])
    with pytest.raises(DataError, match=r"1 of 4 samples in .* cannot be used.\n  - 1 x longer than data.sequence_len"):
        load(folder, [*SAMPLES, BROKEN[1]])
    with pytest.raises(DataError, match=r"Nothing is left"):
        load(folder, BROKEN, on_broken="skip")
    with pytest.raises(DataError, match=r"Nothing is left"):
        load(folder, on_broken="skip", sequence_length=3)


def test_an_image_that_cannot_be_decoded_gives_its_place_to_the_next_sample(folder, caplog):
    samples = [SAMPLES[0] | {"id": "bad", "image": "broken.png"}, *SAMPLES]
    data = load(folder, samples, on_broken="skip")
    with caplog.at_level(logging.ERROR):
        batch = data.train.batch([0])
    assert all(torch.equal(batch[name], tensor) for name, tensor in data.train.batch([1]).items())
    assert "Sample bad is left out" in caplog.text and "broken.png cannot be read as an image" in caplog.text
    assert data.train.left_out.found == {"an image cannot be decoded": ["bad"]}
    data.train.batch([1, 2])
    data.train.batch([0, 3])
    assert len(data.train.left_out) == 2, "as often as it was its turn"
    both = load(folder, [samples[0], samples[0] | {"id": "worse"}, *SAMPLES], on_broken="skip").train
    both.batch([0, 2])
    assert both.left_out.found == {"an image cannot be decoded": ["bad"]}, "it was not the turn of the one after it"
    with pytest.raises(DataError, match=r"broken.png cannot be read as an image"):
        load(folder, samples).train.batch([0])
    with pytest.raises(DataError, match="No sample has images that can be decoded"):
        load(folder, samples[:1], on_broken="skip").train.batch([0])


def test_a_template_that_does_not_exist(folder):
    with pytest.raises(DataError, match="There is no chat template called 'llama'"):
        load(folder, template="llama")


@pytest.mark.parametrize(("size", "box"), [((6, 2), (0, 2, 6, 4)), ((2, 5), (1, 0, 3, 5)), ((3, 3), (0, 0, 3, 3))])
def test_padding_to_a_square_keeps_the_whole_image(size, box):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    square = padded_to_square(image, (1, 2, 3))
    assert square.size == (max(size), max(size))
    pixels = np.array(square)
    left, top, right, bottom = box
    assert (pixels[top:bottom, left:right] == np.array(image)).all()
    beside = np.ones(square.size, bool)
    beside[top:bottom, left:right] = False
    assert (pixels[beside] == (1, 2, 3)).all()


def test_what_cannot_be_learned_or_scored_is_broken(folder):
    silent = {"id": "silent", "conversations": said("What is three plus four?", "")}
    # Of b only the answer is left, a single token, before which there is nothing to tell it from.
    with pytest.raises(DataError, match=r"2 x no answer has a token to learn: b, silent"):
        load(folder, [*SAMPLES, silent], template="plain")
    blurred = SAMPLES[0] | {"id": "blurred", "image": "broken.png"}
    held_out = folder / "more.json"
    held_out.write_text(json.dumps([SAMPLES[0], blurred]))
    with pytest.raises(DataError, match=r"1 x an image cannot be decoded: blurred \(.*broken.png\)"):
        load(folder, held_out_path=f"{held_out}")
    data = load(folder, held_out_path=f"{held_out}", on_broken="skip")
    assert [sample.name for sample in data.held_out.samples] == ["a"]
