"""Chat templates: from a conversation to token ids, and which of them are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerFast

from dynmoe_ds.data.conversations import IMAGE_MARKER, Conversation, Turn
from dynmoe_ds.errors import DataError

IGNORED = -100
"""The label of a token that is not learned."""

# Published checkpoints were trained on these very words (`vicuna_v1` in the code of LLaVA).
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

Segment = tuple[str, bool]
"""A text, and whether it is learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A conversation as ids [L] and labels [L], IGNORED where nothing is learned."""

    input_ids: list[int]
    labels: list[int]


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    *,
    image_token_id: int,
    tokens_per_image: int,
) -> Tokens:
    """Ids and labels under a template of `TEMPLATES`, every image as `tokens_per_image` times `image_token_id`.

    What is learned is tokenised apart from what is not, so that the prompt of a conversation, which is tokenised in the
    same way when the model is used, is always the start of its ids. The tokenizer's BOS token, if it adds one, is the
    first; it is not added to a template that begins with it, as those of Llama, Mistral and Gemma do.
    Raises: DataError for a template that does not exist or that the tokenizer lacks.
    """
    if template not in TEMPLATES:
        raise DataError(f"There is no chat template called {template!r}. Use {', '.join(TEMPLATES)}.")
    segments = list(TEMPLATES[template](conversation, tokenizer))
    ids = _first_ids(tokenizer, "".join(text for text, _ in segments))
    labels = [IGNORED] * len(ids)
    for is_learned, group in groupby(segments, key=lambda segment: segment[1]):
        text = "".join(text for text, _ in group)
        for i, piece in enumerate(text.split(IMAGE_MARKER)):
            if i > 0:
                ids += [image_token_id] * tokens_per_image
                labels += [IGNORED] * tokens_per_image
            new = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            ids += new
            labels += new if is_learned else [IGNORED] * len(new)
    return Tokens(input_ids=ids, labels=labels)


def encode_prompt(
    question: str,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    *,
    image_token_id: int,
    tokens_per_image: int,
) -> list[int]:
    """The ids after which a model answers: those of `encode` before what it would learn."""
    turns = (Turn(text=question, is_learned=False), Turn(text="", is_learned=True))
    tokens = encode(
        Conversation(name="prompt", images=(), turns=turns),
        tokenizer,
        template,
        image_token_id=image_token_id,
        tokens_per_image=tokens_per_image,
    )
    num_prompt = next((i for i, label in enumerate(tokens.labels) if label != IGNORED), len(tokens.labels))
    return tokens.input_ids[:num_prompt]


def _first_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """BOS, if the tokenizer puts it before a text, and this one does not begin with it: as transformers' processors."""
    if tokenizer.bos_token is None or text.startswith(tokenizer.bos_token):
        return []
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def _pairs(conversation: Conversation) -> Iterator[tuple[Turn, Turn]]:
    return zip(conversation.turns[::2], conversation.turns[1::2], strict=True)


def _plain(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Iterator[Segment]:
    """Images, then their captions: of what the human says only the images stay. For the projector's stage."""
    for question, answer in _pairs(conversation):
        yield IMAGE_MARKER * question.text.count(IMAGE_MARKER), False
        yield f"{answer.text}\n", True


def _vicuna(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Iterator[Segment]:
    """LLaVA 1.5's and MoE-LLaVA's form: `SYSTEM USER: question ASSISTANT: answer</s>USER: ...`."""
    end = _end(tokenizer, "vicuna")
    yield f"{VICUNA_SYSTEM} ", False
    for question, answer in _pairs(conversation):
        yield f"USER: {question.text} ASSISTANT:", False
        yield f" {answer.text}{end}", True


def _own(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Iterator[Segment]:
    """The template that came with the tokenizer. Learned is what an answer adds to the text of all before it."""
    if tokenizer.chat_template is None:
        raise DataError("The tokenizer has no chat template. Use the template vicuna or plain.")
    messages: list[dict[str, str]] = []
    done = ""
    for turn in conversation.turns:
        messages.append({"role": "assistant" if turn.is_learned else "user", "content": turn.text})
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not turn.is_learned))
        if not text.startswith(done):
            raise DataError(
                "The tokenizer's chat template changes the text of earlier turns when a turn is added, so that what is "
                "learned cannot be told from the rest. Use the template vicuna."
            )
        yield text.removeprefix(done), turn.is_learned
        done = text


def _end(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    if tokenizer.eos_token is None:
        raise DataError(f"The template {template} ends answers with the tokenizer's EOS token, but it has none.")
    return str(tokenizer.eos_token)


TEMPLATES: dict[str, Callable[[Conversation, PreTrainedTokenizerFast], Iterator[Segment]]] = {
    "plain": _plain,
    "vicuna": _vicuna,
    "own": _own,
}
