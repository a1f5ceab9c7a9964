"""Transformers' processor, read from its files, against what questions and images become in `dynmoe generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.chat_templates import PUBLISHED, published_tokenizer
from transformers import AutoProcessor, PreTrainedTokenizerFast

from dynmoe_ds.data import ImageInput, read_picture, train_tokenizer
from dynmoe_ds.data.chat import TEMPLATES, encode_prompt
from dynmoe_ds.data.processor import llava_processor, save_processor
from dynmoe_ds.data.tokenizer import END_OF_TEXT
from dynmoe_ds.errors import DataError

IMAGE = ImageInput(size=24, num_tokens=9, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs, of which some go over the ends of a template's parts: ` USER`, `. USER`."""
    texts = ["questions. USER: which digit is it? ASSISTANT: seven", "user\nWhat is it?", "assistant\n"] * 20
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts, 330), eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, chat_template=CHATML
    )


def read_back(tokenizer: PreTrainedTokenizerFast, folder: Path, template: str, strategy: str = "default") -> Any:
    image_token_id = max(tokenizer.get_vocab().values()) + 1
    made = llava_processor(
        tokenizer, IMAGE, template, image_token_id=image_token_id, patch_size=8, feature_strategy=strategy
    )
    save_processor(made, folder)
    return AutoProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_become_the_same_ids(template: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Also a tokenizer's that had no image token; it is left as it was."""
    processor = read_back(tokenizer, tmp_path, template)
    assert "<image>" not in tokenizer.get_vocab()
    image = Image.new("RGB", (30, 20), (9, 99, 199))
    for question in ("<image>\nWhich digit is it?", "<image>What <image> is it? ", "Which digit?", "Say 'it'.\n"):
        if template == "plain" and "<image>" not in question:
            continue  # of which it takes nothing
        rendered = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        images = [image] * question.count("<image>")
        found = processor(text=rendered, images=images or None).input_ids[0]
        want = encode_prompt(
            question, tokenizer, template, image_token_id=max(tokenizer.get_vocab().values()) + 1, tokens_per_image=9
        )
        assert list(found) == want, question
    parts = [{"type": "image"}, {"type": "text", "text": "Which digit?"}]
    rendered = [
        processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for content in (parts, "<image>\nWhich digit?")
    ]
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_template_begins_as_the_processor_begins_it(name: str, adds_bos: bool, tmp_path: Path) -> None:
    """With one BOS, whether the template writes it or the tokenizer adds it."""
    words = published_tokenizer(name, train_tokenizer(["Which digit is it? user"], 300), adds_bos=adds_bos)
    processor = read_back(words, tmp_path, "own")
    image = Image.new("RGB", (30, 20), (9, 99, 199))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Which digit is it?"}]
    found = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    want = encode_prompt(
        "<image>\nWhich digit is it?", words, "own", image_token_id=max(words.get_vocab().values()) + 1,
        tokens_per_image=9,
    )  # fmt: skip
    assert list(found["input_ids"][0]) == want
    begins = name in ("Llama-2", "Llama-3", "Mistral", "Gemma") or (name == "Zephyr" and adds_bos)
    assert (want[0] == words.bos_token_id, want.count(words.bos_token_id)) == (begins, int(begins))


def test_answers_and_unknown_roles(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    vicuna = read_back(tokenizer, tmp_path / "vicuna", "vicuna")
    assert vicuna.apply_chat_template(talk).endswith(f" USER: a ASSISTANT: b{END_OF_TEXT}USER: c ASSISTANT:")
    assert read_back(tokenizer, tmp_path / "plain", "plain").apply_chat_template(talk) == "b\n"
    with pytest.raises(Exception, match="Messages are of the roles user and assistant alone"):
        vicuna.apply_chat_template([{"role": "system", "content": "a"}])


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_images_become_the_same_pixels(strategy: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Wide ones, tall ones and squares, grey ones and coloured ones; and as many tokens."""
    processor = read_back(tokenizer, tmp_path, "vicuna", strategy)
    draw = np.random.default_rng(0)
    for shape in ((20, 50, 3), (51, 20, 3), (24, 24, 3), (7, 90), (1, 2, 3)):
        image = Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))
        image.save(tmp_path / "image.png")
        found = processor(text="<image>", images=[image], return_tensors="pt")
        assert torch.equal(found.pixel_values[0], read_picture(tmp_path / "image.png", IMAGE)), shape
        assert found.input_ids.shape == (1, 9)


def test_an_image_token_that_would_be_another_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"would give <image> the id \d+, but the model knows it as 999"):
        llava_processor(tokenizer, IMAGE, "own", image_token_id=999, patch_size=8, feature_strategy="full")
