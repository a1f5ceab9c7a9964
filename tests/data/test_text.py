import pydoc_data.topics

import pytest
import torch

from dynmoe_ds.config.schema import TextDataConfig
from dynmoe_ds.data import END_OF_TEXT, load_text_data
from dynmoe_ds.data.sequences import pack
from dynmoe_ds.data.text import BLOCK_CHARACTERS, prepare_text, read_text, split_text
from dynmoe_ds.data.tokenizer import train_tokenizer
from dynmoe_ds.errors import DataError


def _config(**changes) -> TextDataConfig:
    values = {"name": "text_file", "vocab_size": 260, "sequence_length": 16, "held_out_every": 4, "path": None}
    return TextDataConfig(**{**values, **changes})


def _numbered_text(num_characters: int) -> str:
    """Text in which no two blocks are alike."""
    return "".join(f"{number:06d} " for number in range(num_characters // 7 + 1))[:num_characters]


@pytest.mark.parametrize("num_characters", [6_001, 8_000, 8_001, 19_999, 24_000])
def test_split_covers_the_text_without_overlap(num_characters):
    text = _numbered_text(num_characters)
    train, held_out = split_text(text, 4)
    blocks = [text[start : start + BLOCK_CHARACTERS] for start in range(0, len(text), BLOCK_CHARACTERS)]
    assert held_out == blocks[3::4]
    assert "".join(train) == "".join(block for number, block in enumerate(blocks) if number % 4 != 3)


def test_split_documents_end_where_text_was_held_out():
    train, held_out = split_text(_numbered_text(17_000), 4)
    assert [len(document) for document in train] == [6_000, 6_000, 1_000]
    assert [len(document) for document in held_out] == [2_000, 2_000]


def test_tokenizer_is_trained_on_the_training_part_alone():
    text = "plain words " * 500 + "zyxwv" * 400 + "plain words " * 100  # block 4 of 4 is the strange one
    data = prepare_text(text[:8_000], _config(vocab_size=300))
    learnt = data.tokenizer().get_vocab()
    assert "plain" in "".join(learnt)
    assert not any("zy" in token or "wv" in token for token in learnt)


def test_pack_joins_documents_and_drops_only_the_tail():
    tokenizer = train_tokenizer(["abc"], 257)  # one token per byte
    end = tokenizer.token_to_id(END_OF_TEXT)
    a, b, c = (tokenizer.token_to_id(letter) for letter in "abc")
    packed = pack(["abc", "ba", "cccc"], tokenizer, 4)
    assert packed.tokens.tolist() == [[a, b, c, end], [b, a, end, c], [c, c, c, end]]
    assert pack(["ab"], tokenizer, 4).tokens.shape == (0, 4)
    batch = packed.batch([2, 0])
    assert batch["input_ids"].tolist() == [[c, c, c, end], [a, b, c, end]]
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_pydoc_topics_are_all_there_and_repeatable():
    config = _config(name="pydoc_topics", vocab_size=512, held_out_every=10, sequence_length=128)
    text = read_text(config)
    assert all(topic in text for topic in pydoc_data.topics.topics.values())
    first, second = load_text_data(config), load_text_data(config)
    assert first.tokenizer_json == second.tokenizer_json
    assert torch.equal(first.train.tokens, second.train.tokens)
    assert first.tokenizer().get_vocab_size() == 512
    assert 7 < len(first.train) / len(first.held_out) < 11
    shown = first.tokenizer().decode(first.train.tokens[0].tolist(), skip_special_tokens=False)
    assert text.startswith(shown)


def test_text_file_is_read_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("Zeile 1\r\nZeile zwö\n".encode())
    assert read_text(_config(path=str(tmp_path / "a.txt"))) == "Zeile 1\r\nZeile zwö\n"


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.path is '.*nowhere\.txt' but there is no such file"):
        read_text(_config(path=str(tmp_path / "nowhere.txt")))


def test_a_folder_is_no_text_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        read_text(_config(path=str(tmp_path)))


def test_a_text_file_needs_a_path():
    with pytest.raises(DataError, match=r"data\.path is not set"):
        read_text(_config())


def test_a_file_that_is_not_utf8_is_refused_with_the_place(tmp_path):
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xfc at offset 1"):
        read_text(_config(path=str(tmp_path / "latin.txt")))


def test_a_text_too_short_to_hold_out_a_block_is_refused():
    with pytest.raises(DataError, match=r"has 6000 characters, but with .*_every=4 it needs more than 6000"):
        split_text("x" * 6_000, 4)


def test_holding_out_everything_is_refused():
    with pytest.raises(DataError, match=r"held_out_every is 1, which leaves no text"):
        split_text("x" * 6_000, 1)


def test_a_held_out_part_shorter_than_a_sequence_is_refused():
    with pytest.raises(DataError, match=r"The held-out part has 5 characters, .*data\.sequence_length=16"):
        prepare_text(_numbered_text(6_005), _config())


def test_a_training_part_shorter_than_a_sequence_is_refused():
    with pytest.raises(DataError, match=r"The training part has 2000 characters, .*data\.sequence_length=5000"):
        prepare_text(_numbered_text(4_000), _config(held_out_every=2, sequence_length=5_000))
