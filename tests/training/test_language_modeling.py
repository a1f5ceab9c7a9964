"""The task of text on token shards: what a run keeps beside the weights, and when it has no text to write."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.megatron import NUM_WORDS, needs_megatron, word_tokenizer, write_documents
from tests.helpers.run_config import small_run
from tests.helpers.shards import write_shards
from torch import nn
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.config.schema import MegatronIndexedConfig, TokenShardsConfig
from dynmoe_ds.data import train_tokenizer
from dynmoe_ds.errors import DataError
from dynmoe_ds.training.tasks import LanguageModeling, build_task

VOCAB_SIZE, END = 260, 258


class UniformEngine:
    """Finds every token equally likely, and notes which it was shown."""

    module, device = nn.Identity(), torch.device("cpu")

    def __init__(self) -> None:
        self.shown: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        self.shown |= set(input_ids.flatten().tolist())
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB_SIZE))

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


def _task(folder: Path, **training: Any) -> LanguageModeling:
    write_shards(folder, {"a.bin": [5] * 48 + [7] * 16}, vocab_size=VOCAB_SIZE)
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index.replace('"end_of_text": 0', f'"end_of_text": {END}'))
    data = TokenShardsConfig(path=str(folder), sequence_length=8, held_out_windows=2)
    changes = {f"training__{key}": value for key, value in training.items()}
    task = build_task(small_run(data=data, **changes))
    assert isinstance(task, LanguageModeling)
    return task


def _with_tokenizer(folder: Path) -> None:
    """A tokenizer in which another token than ours ends a text."""
    folder.mkdir()
    tokenizer = train_tokenizer(["abc"], 257)
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_sizes_come_from_the_shards(tmp_path):
    task = _task(tmp_path, sample_tokens=0)
    assert (len(task.train), task.num_held_out, task.tokens_per_example, task.token_kinds) == (6, 2, 8, ())
    model = task.build_model()
    assert model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE
    assert model.config.eos_token_id == END


def test_evaluation_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary(tmp_path):
    engine = UniformEngine()
    values = _task(tmp_path, sample_tokens=0).evaluate(engine)
    assert engine.shown == {7}, "the last two windows are held out"
    assert values == {"eval/loss": pytest.approx(torch.tensor(float(VOCAB_SIZE)).log().item(), rel=1e-6)}


def test_the_tokenizer_is_kept_with_its_own_end_of_text(tmp_path):
    _with_tokenizer(tmp_path / "shards")
    task = _task(tmp_path / "shards", sample_tokens=4, sample_prompt="abc")
    task.write_files(tmp_path)
    kept = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    assert (kept.eos_token, kept.eos_token_id) == ("</s>", END)
    text = task.sample(UniformEngine())
    assert text is not None and text.startswith("abc") and text.endswith("\n")


def test_shards_without_a_tokenizer_train_without_one(tmp_path):
    task = _task(tmp_path / "shards", sample_tokens=0)
    task.write_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
    assert task.sample(UniformEngine()) is None


def test_a_sample_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"sample_tokens is 4, but .* has no tokenizer\.json to write text with\. Put"):
        _task(tmp_path, sample_tokens=4)


@needs_megatron
def test_indexed_data_of_megatron_bring_vocabulary_and_tokenizer(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "words")
    path = write_documents(tmp_path / "corpus", [range(10, 17)] * 9 + [range(20, 27)], tokenizer)
    data = MegatronIndexedConfig(paths=(path,), tokenizer=tokenizer, sequence_length=8, held_out_fraction=0.1)
    task = build_task(small_run(data=data, training__sample_tokens=4, training__sample_prompt="11 12"))
    assert (len(task.train), task.num_held_out, task.tokens_per_example) == (9, 1, 8)
    model = task.build_model()
    assert model.get_input_embeddings().weight.shape[0] == NUM_WORDS + 1
    assert model.config.eos_token_id == NUM_WORDS
    task.write_files(tmp_path)
    kept = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    assert kept("11 12")["input_ids"] == [11, 12] and kept.eos_token_id == NUM_WORDS
