"""Samples in one row compute and teach what they do alone, in every decoder for which packing is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import dynmoe_ds as dm
from dynmoe_ds.data.chat import IGNORED
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.models import PACKABLE, check_packing, dense_model, take_conversations
from dynmoe_ds.moe import watch_padding

IMAGE = 3
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float64 but for the softmax and norms of some decoders
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
# The tokens of the samples of two rows: with two images, one and none, the shortest possible, and padding in one row.
ROWS = [(9, 6, 1, 4), (7, 1)]
NUM_IMAGES = [(2, 1, 0, 0), (1, 0)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More cost more than they give where a product has a hundred numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llava(decoder: str, attention: str = "sdpa", **options: Any) -> LlavaForConditionalGeneration:
    """In float64, with images of 2 x 1 tokens."""
    sizes = dict(SIZES, **options)
    if decoder == "phi":
        sizes["hidden_act"] = "gelu_new"
    backbone = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=8, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ),
        text_config=AutoConfig.for_model(decoder, **sizes),
        image_token_id=IMAGE,
        image_seq_length=1,
    )
    model = dense_model(LlavaForConditionalGeneration, backbone, seed=0)
    model.model.language_model.config._attn_implementation = attention
    take_conversations(model)
    return model.double().train()


def samples() -> list[list[dict[str, Tensor]]]:
    """Of every row: ids and labels [1, n], the first of them learned nowhere, and pictures [I, 3, 8, 8]."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for lengths, numbers in zip(ROWS, NUM_IMAGES, strict=True):
        row = []
        for length, num_images in zip(lengths, numbers, strict=True):
            ids = torch.randint(4, 40, (1, length), generator=generator)
            labels = ids.clone()
            labels[:, :1] = IGNORED
            ids[:, 1 : 1 + num_images] = IMAGE
            labels[:, : 1 + num_images] = IGNORED
            pictures = torch.randn(num_images, 3, 8, 8, generator=generator).double()
            row.append({"input_ids": ids, "labels": labels, "pixel_values": pictures})
        rows.append(row)
    return rows


def packed() -> dict[str, Tensor]:
    """All samples in two rows."""
    length = max(map(sum, ROWS))
    batch = {
        "input_ids": torch.zeros(2, length, dtype=torch.int64),
        "labels": torch.full((2, length), IGNORED),
        "packed_positions": torch.zeros(2, length, dtype=torch.int64),
        "attention_mask": torch.zeros(2, length, dtype=torch.bool),
    }
    for number, row in enumerate(samples()):
        first = 0
        for sample in row:
            last = first + sample["input_ids"].shape[1]
            batch["input_ids"][number, first:last] = sample["input_ids"]
            batch["labels"][number, first:last] = sample["labels"]
            batch["packed_positions"][number, first:last] = torch.arange(last - first)
            batch["attention_mask"][number, first:last] = True
            first = last
        batch["packed_positions"][number, first:] = torch.arange(length - first)
    return batch | {"pixel_values": torch.cat([sample["pixel_values"] for row in samples() for sample in row])}


def alone(model: LlavaForConditionalGeneration) -> list[list[Tensor]]:
    """The logits [n, V] of every sample by itself; the mean loss of all learned tokens has gone backward."""
    num_learned = sum(int((sample["labels"] != IGNORED).sum()) for row in samples() for sample in row)
    found = []
    for row in samples():
        logits = []
        for sample in row:
            pictures = sample.pop("pixel_values")
            given = {"pixel_values": pictures} if len(pictures) else {}
            output = model(**sample, **given)
            logits.append(output.logits[0].detach())
            learned = int((sample["labels"] != IGNORED).sum())
            if learned:
                (output.loss * learned / num_learned).backward()
        found.append(logits)
    return found


def gradients(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


CASES = [(decoder, attention, {}) for decoder in PACKABLE for attention in ("sdpa", "eager")]
CASES += [("mistral", "sdpa", {"sliding_window": 4}), ("qwen2", "eager", {"use_sliding_window": True})]
CASES[-1][2].update(sliding_window=4, max_window_layers=1)


@pytest.mark.parametrize(("decoder", "attention", "options"), CASES)
def test_a_packed_row_computes_and_teaches_what_its_samples_do(
    decoder: str, attention: str, options: dict[str, Any]
) -> None:
    model = llava(decoder, attention, **options)
    check_packing(model)
    wanted_logits = alone(model)
    wanted = gradients(model)
    model.zero_grad()
    output = model(**packed())
    output.loss.backward()
    for row, logits in zip(wanted_logits, output.logits, strict=True):
        together = torch.cat(row)
        torch.testing.assert_close(logits[: len(together)], together, **CLOSE)
    got = gradients(model)
    assert set(got) == set(wanted) and any("vision_tower" in name for name in got)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    # The samples do see one another where nobody says where they begin: the comparison can fail.
    blind = {name: tensor for name, tensor in packed().items() if name != "packed_positions"}
    assert not torch.allclose(model(**blind).logits[0, 9:20], output.logits[0, 9:20], rtol=1e-3)


def test_padding_of_packed_rows_is_routed_nowhere() -> None:
    model = llava("llama")
    dm.upcycle(
        model.model.language_model, layers="all", num_experts=2, num_slots=2,
        router=dm.TopKConfig(k=1, renormalize=False),
    )  # fmt: skip
    model.double()
    watch_padding(model)
    with dm.StepLedger() as ledger:
        model(**packed())
    assert [int(records.num_tokens) for records in ledger.records().values()] == [28, 28] == [sum(map(sum, ROWS))] * 2


def test_a_decoder_or_attention_that_may_mix_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is of type granite. Samples in one row are known to stay apart in gemma, "):
        check_packing(llava("granite"))
    model = llava("llama")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"is flash_attention_2, in which samples .* Use eager or sdpa, or set"):
        check_packing(model)
