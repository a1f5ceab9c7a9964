import pytest
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.data import END_OF_TEXT, save_tokenizer, train_tokenizer
from dynmoe_ds.errors import DataError

DOCUMENTS = ["the cat sat on the mat , and the hat . " * 20, "naïve café über alles\n\n\tif x:\n" * 20]
STRANGE = "Grüße,  , 漢字 🦊 e\u0301 \x00 \r\n\ttab   spaces . \u200b and don't !"


@pytest.mark.parametrize("text", [STRANGE, "", " ", "\n"])
def test_any_text_survives_encode_and_decode(text):
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_saved_tokenizer_loads_in_transformers_and_gives_the_same_ids_and_text(tmp_path):
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    save_tokenizer(tokenizer, tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = tokenizer.encode(STRANGE).ids
    assert loaded(STRANGE)["input_ids"] == ids
    assert loaded.decode(ids) == STRANGE
    assert loaded.eos_token == END_OF_TEXT
    assert loaded.eos_token_id == tokenizer.token_to_id(END_OF_TEXT)
    assert len(loaded) == tokenizer.get_vocab_size()


def test_training_is_repeatable():
    assert train_tokenizer(DOCUMENTS, 300).to_str() == train_tokenizer(DOCUMENTS, 300).to_str()


def test_vocab_size_is_kept():
    assert train_tokenizer(DOCUMENTS, 280).get_vocab_size() == 280
    assert train_tokenizer(DOCUMENTS, 257).get_vocab_size() == 257


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"data\.vocab_size is 256 but .* at least 257"):
        train_tokenizer(DOCUMENTS, 256)
