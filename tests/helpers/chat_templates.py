"""Chat templates as models publish them, a tokenizer with what they need, and what they make of one conversation."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A template in Jinja, the tokens that it needs, and what it makes of `Which digit?`, `Seven.`, `Sure?`, `Yes.`

    prompt: up to the first answer. text: all. learned: what the answers add. bos: None for a tokenizer without.
    """

    jinja: str
    bos: str | None
    eos: str
    others: tuple[str, ...] = ()
    prompt: str
    learned: tuple[str, str]
    between: str

    @property
    def text(self) -> str:
        return f"{self.prompt}{self.learned[0]}{self.between}{self.learned[1]}"


PUBLISHED = {
    "Llama-2": Published(
        jinja="{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}" + _ALTERNATE
        + "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        bos="<s>", eos="</s>",
        prompt="<s>[INST] Which digit? [/INST]",
        learned=(" Seven. </s>", " Yes. </s>"),
        between="<s>[INST] Sure? [/INST]",
    ),
    "Llama-3": Published(
        jinja="{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
        "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        bos="<|begin_of_text|>", eos="<|eot_id|>", others=("<|start_header_id|>", "<|end_header_id|>"),
        prompt="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhich digit?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        learned=("Seven.<|eot_id|>", "Yes.<|eot_id|>"),
        between="<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Mistral": Published(
        jinja="{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        bos="<s>", eos="</s>",
        prompt="<s>[INST] Which digit? [/INST]",
        learned=("Seven.</s>", "Yes.</s>"),
        between="[INST] Sure? [/INST]",
    ),
    "Gemma": Published(
        jinja="{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}" + _ALTERNATE
        + "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        bos="<bos>", eos="<eos>", others=("<start_of_turn>", "<end_of_turn>"),
        prompt="<bos><start_of_turn>user\nWhich digit?<end_of_turn>\n<start_of_turn>model\n",
        learned=("Seven.<end_of_turn>\n", "Yes.<end_of_turn>\n"),
        between="<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Zephyr": Published(  # and StableLM 2 Zephyr, whose end of text is <|endoftext|>
        jinja="{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        bos="<s>", eos="</s>",
        prompt="<|user|>\nWhich digit?</s>\n<|assistant|>\n",
        learned=("Seven.</s>\n", "Yes.</s>\n"),
        between="<|user|>\nSure?</s>\n<|assistant|>\n",
    ),
    "Qwen1.5": Published(
        jinja="{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        bos=None, eos="<|im_end|>", others=("<|im_start|>",),
        prompt="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhich digit?<|im_end|>\n"
        "<|im_start|>assistant\n",
        learned=("Seven.<|im_end|>\n", "Yes.<|im_end|>\n"),
        between="<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    ),
}  # fmt: skip


def published_tokenizer(name: str, words: Tokenizer, *, adds_bos: bool) -> PreTrainedTokenizerFast:
    """`words` with the template's tokens; adds_bos: whether every text begins with BOS, where there is one."""
    of = PUBLISHED[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=of.bos, eos_token=of.eos, pad_token=of.eos, chat_template=of.jinja
    )
    tokenizer.add_tokens([*of.others], special_tokens=True)
    if of.bos is not None and adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{of.bos} $A", special_tokens=[(of.bos, tokenizer.bos_token_id)]
        )
    return tokenizer
