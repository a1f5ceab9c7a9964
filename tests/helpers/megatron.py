"""What tests with megatron-core share: whether it is there, and small indexed data sets of words."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.data.megatron_indexed import read_vocabulary
from dynmoe_ds.data.megatron_writer import write_indexed_dataset
from dynmoe_ds.integrations.megatron import find_megatron

needs_megatron = pytest.mark.skipif(find_megatron() is None, reason="megatron-core is not installed (extra: megatron)")

NUM_WORDS = 200


def word_tokenizer(folder: Path) -> str:
    """A tokenizer, saved in `folder`, for which the word `17` is the id 17 and the id NUM_WORDS ends a text."""
    words = {str(number): number for number in range(NUM_WORDS)} | {"</s>": NUM_WORDS}
    tokenizer = Tokenizer(WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return str(folder)


def write_documents(prefix: Path, documents: list[range], tokenizer: str) -> str:
    """An indexed data set of these documents of ids; its prefix."""
    texts = [" ".join(map(str, ids)) for ids in documents]
    write_indexed_dataset(texts, prefix, read_vocabulary(tokenizer))
    return str(prefix)
