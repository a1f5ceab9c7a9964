"""Transformers' processor, which makes of questions and images what `dynmoe generate` does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import AddedToken, LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from dynmoe_ds.data.chat import VICUNA_SYSTEM
from dynmoe_ds.data.conversations import IMAGE_MARKER
from dynmoe_ds.data.image_statistics import IMAGE_PROCESSOR_FILE
from dynmoe_ds.data.llava import ImageInput
from dynmoe_ds.errors import DataError

# A message's content may be a text, or a list of images and texts, as transformers writes it: then each image becomes
# a marker and a line's end, as in LLaVA's files.
_AS_TEXTS = (
    "{%- set found = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set text = namespace(value=message['content']) -%}"
    "{%- else -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- for part in message['content'] -%}"
    f"{{%- set text.value = text.value + ('{IMAGE_MARKER}\\n' if part['type'] == 'image' else part['text']) -%}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- set found.messages = found.messages + [{'role': message['role'], 'content': text.value}] -%}"
    "{%- endfor -%}"
    "{%- set messages = found.messages -%}"
)
_ROLES = (
    "{%- if message['role'] not in ['user', 'assistant'] -%}"
    "{{ raise_exception('Messages are of the roles user and assistant alone.') }}"
    "{%- endif -%}"
)
_TEMPLATES = {
    "plain": "{%- for message in messages -%}" + _ROLES + "{%- if message['role'] == 'user' -%}"
    f"{{{{ '{IMAGE_MARKER}' * (message['content'].split('{IMAGE_MARKER}') | length - 1) }}}}"
    "{%- else -%}{{ message['content'] + '\\n' }}{%- endif -%}{%- endfor -%}",
    "vicuna": f"{{{{ {VICUNA_SYSTEM + ' '!r} }}}}" + "{%- for message in messages -%}" + _ROLES
    + "{%- if message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{%- else -%}{{ ' ' + message['content'] + eos_token }}{%- endif -%}{%- endfor -%}",
}  # fmt: skip
"""What `dynmoe_ds.data.chat` does, in Jinja, of messages whose contents are texts."""


def llava_processor(
    tokenizer: PreTrainedTokenizerFast,
    image: ImageInput,
    template: str,
    *,
    image_token_id: int,
    patch_size: int,
    feature_strategy: str,
) -> LlavaProcessor:
    """The processor of a model that was trained with such images and a template of `dynmoe_ds.data.chat`.

    feature_strategy: the model's `vision_feature_select_strategy`. A tokenizer without an image token gets one.
    Raises: DataError for a tokenizer that would give the image token another id.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(AddedToken(IMAGE_MARKER, normalized=False, special=True), special_tokens=True)
    if (found := tokenizer.convert_tokens_to_ids(IMAGE_MARKER)) != image_token_id:
        raise DataError(
            f"The tokenizer would give {IMAGE_MARKER} the id {found}, but the model knows it as {image_token_id}: its "
            "vocabulary has gaps. Add the token to the tokenizer before training."
        )
    made: Any = LlavaProcessor  # transformers has no types
    return made(
        image_processor=LlavaImageProcessorPil(
            do_pad=True,  # to a square
            size={"shortest_edge": image.size},
            crop_size={"height": image.size, "width": image.size},
            image_mean=list(image.mean),
            image_std=list(image.std),
            resample=image.resample,
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=feature_strategy,
        num_additional_image_tokens=int(feature_strategy == "default"),
        chat_template=_AS_TEXTS + (tokenizer.chat_template if template == "own" else _TEMPLATES[template]),
    )


def save_processor(processor: LlavaProcessor, folder: Path) -> None:
    """Write its files into a folder, the tokenizer's included."""
    processor.save_pretrained(folder)
    # Beside processor_config.json, which holds it too, for what reads image processors alone.
    processor.image_processor.to_json_file(folder / IMAGE_PROCESSOR_FILE)
