"""Chat templates: what the text is, what is learned, and where the images stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.helpers.chat_templates import PUBLISHED, published_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.data.chat import IGNORED, VICUNA_SYSTEM, Tokens, encode, encode_prompt
from dynmoe_ds.data.conversations import Conversation, Turn
from dynmoe_ds.data.tokenizer import END_OF_TEXT, train_tokenizer
from dynmoe_ds.errors import DataError

IMAGE_ID, PER_IMAGE = 999, 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(["which digit is it? it is seven."], 300), eos_token=END_OF_TEXT, **options
    )


def talk(*texts: str, num_images: int = 1) -> Conversation:
    turns = tuple(Turn(text=text, is_learned=i % 2 == 1) for i, text in enumerate(texts))
    return Conversation(name="a", images=(Path("one.png"),) * num_images, turns=turns)


TALK = talk("<image>\nWhich digit?", "Seven.", "Sure?", "Yes.")


def run(template: str, conversation: Conversation = TALK, **options: Any) -> tuple[str, list[str], Tokens]:
    """The whole text with [I] for an image's tokens, the learned stretches, and the tokens."""
    words = tokenizer(**options)
    found = encode(conversation, words, template, image_token_id=IMAGE_ID, tokens_per_image=PER_IMAGE)
    return *texts(words, found), found


def texts(words: PreTrainedTokenizerFast, found: Tokens) -> tuple[str, list[str]]:
    """The whole text, and the learned stretches."""
    assert len(found.input_ids) == len(found.labels)
    text, learned, stretch = "", [], []
    for token, label in zip([*found.input_ids, None], [*found.labels, IGNORED], strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            stretch.append(token)
        elif stretch:
            learned.append(words.decode(stretch))
            stretch = []
        if token is not None:
            text += "[I]" if token == IMAGE_ID else words.decode([token])
    return text, learned


def test_plain_keeps_images_and_answers() -> None:
    text, learned, _ = run("plain", talk("<image>\nDescribe it.", "a seven"))
    assert text == "[I]" * PER_IMAGE + "a seven\n" and learned == ["a seven\n"]


def test_vicuna() -> None:
    text, learned, _ = run("vicuna")
    first = f"{VICUNA_SYSTEM} USER: {'[I]' * PER_IMAGE}\nWhich digit? ASSISTANT: Seven.{END_OF_TEXT}"
    assert text == f"{first}USER: Sure? ASSISTANT: Yes.{END_OF_TEXT}"
    assert learned == [f" Seven.{END_OF_TEXT}", f" Yes.{END_OF_TEXT}"]


def test_the_tokenizers_own() -> None:
    text, learned, _ = run("own", chat_template=CHATML)
    user, model = "<|im_start|>user\n", "<|im_start|>assistant\n"
    first = f"{user}{'[I]' * PER_IMAGE}\nWhich digit?<|im_end|>\n{model}Seven.<|im_end|>\n"
    assert text == f"{first}{user}Sure?<|im_end|>\n{model}Yes.<|im_end|>\n"
    assert learned == ["Seven.<|im_end|>\n", "Yes.<|im_end|>\n"]


@pytest.mark.parametrize("template", ["plain", "vicuna", "own"])
def test_several_images_stand_where_their_markers_do_and_are_never_learned(template: str) -> None:
    conversation = talk("<image> and <image>", "two <image>", num_images=3)
    text, learned, found = run(template, conversation, chat_template=CHATML)
    assert text.count("[I]") == 3 * PER_IMAGE and len(learned) >= 1
    images = [label for token, label in zip(found.input_ids, found.labels, strict=True) if token == IMAGE_ID]
    assert images == [IGNORED] * 3 * PER_IMAGE


@pytest.mark.parametrize("template", ["vicuna", "own"])
def test_a_prompt_is_the_start_of_the_conversation(template: str) -> None:
    """What is generated from must be tokenised as in training, also where words could be merged across the border."""
    options = {"image_token_id": IMAGE_ID, "tokens_per_image": PER_IMAGE}
    words = tokenizer(chat_template=CHATML)
    whole = encode(TALK, words, template, **options).input_ids
    shorter = encode(talk("<image>\nWhich digit?", "Seven."), words, template, **options).input_ids
    assert whole[: len(shorter)] == shorter and len(whole) > len(shorter)


def test_a_tokenizer_that_begins_with_bos_does_so_once() -> None:
    words = tokenizer(bos_token=END_OF_TEXT)
    plain = encode(TALK, words, "vicuna", image_token_id=IMAGE_ID, tokens_per_image=1)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, words.bos_token_id)]
    )
    found = encode(TALK, words, "vicuna", image_token_id=IMAGE_ID, tokens_per_image=1)
    assert found.input_ids == [words.bos_token_id, *plain.input_ids]
    assert found.labels == [IGNORED, *plain.labels]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_template_gives_what_transformers_makes_of_it(name: str, adds_bos: bool) -> None:
    """BOS stands where the template writes it, and is added in front, as processors do it, where none does."""
    of, said = PUBLISHED[name], ("Which digit?", "Seven.", "Sure?", "Yes.")
    words = published_tokenizer(name, train_tokenizer(["Which digit? Seven. Sure? Yes. user"], 300), adds_bos=adds_bos)
    found = encode(talk(*said, num_images=0), words, "own", image_token_id=IMAGE_ID, tokens_per_image=1)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    added = [words.bos_token_id] if adds_bos and name == "Zephyr" else []
    assert found.input_ids == added + words.apply_chat_template(messages, return_dict=False)
    text, learned = texts(words, found)
    assert text == words.decode(added) + of.text and tuple(learned) == of.learned
    prompt = encode_prompt(said[0], words, "own", image_token_id=IMAGE_ID, tokens_per_image=1)
    want = words.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert prompt == added + want == found.input_ids[: len(prompt)]
    assert found.labels[: len(prompt)] == [IGNORED] * len(prompt) and found.labels[len(prompt)] != IGNORED


CHANGING = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "options", "words"),
    [
        ("vikuna", {}, "There is no chat template called 'vikuna'. Use plain, vicuna, own."),
        ("own", {}, "The tokenizer has no chat template"),
        ("own", {"chat_template": CHANGING}, "changes the text of earlier turns"),
    ],
)
def test_templates_that_cannot_be_used(template: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        run(template, **options)
    assert words in str(caught.value)


def test_vicuna_needs_an_end() -> None:
    words = tokenizer()
    words.eos_token = None
    with pytest.raises(DataError, match="EOS token, but it has none"):
        encode(TALK, words, "vicuna", image_token_id=IMAGE_ID, tokens_per_image=1)
