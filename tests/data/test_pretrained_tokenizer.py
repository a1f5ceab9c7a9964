from pathlib import Path

import pytest
from tests.helpers.glue import write_tokenizer
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer

from dynmoe_ds.data.pretrained_tokenizer import load_pretrained_tokenizer
from dynmoe_ds.errors import DataError


def test_a_folder_and_its_file_give_the_same_tokens(tmp_path):
    write_tokenizer(tmp_path)
    folder, file = (load_pretrained_tokenizer(str(place)) for place in (tmp_path, tmp_path / "tokenizer.json"))
    pair = (["it rains ."], ["it is dry and wet ."])
    assert folder(*pair)["input_ids"] == file(*pair)["input_ids"]
    assert folder.pad_token == file.pad_token == "[PAD]"


def _without_padding(folder: Path) -> str:
    file = folder / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(file))
    return str(file)


def _broken(folder: Path) -> str:
    file = folder / "tokenizer.json"
    file.write_text("{}")
    return str(file)


def _slow(folder: Path) -> str:
    ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


def test_padding_is_no_need_of_all(tmp_path):
    assert load_pretrained_tokenizer(_without_padding(tmp_path), needs_padding=False).pad_token is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "data.tokenizer is not set"),
        (lambda folder: str(folder / "absent"), r"there is no such file or folder \(seen from"),
        (lambda folder: str(folder), "holds no tokenizer that can be read"),
        (_broken, "holds no tokenizer that can be read"),
        (_slow, "ByT5Tokenizer is no fast tokenizer"),
        (_without_padding, "names no padding token"),
    ],
    ids=["not set", "absent", "empty folder", "broken file", "slow", "no padding"],
)
def test_what_holds_no_usable_tokenizer_is_refused(make, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_pretrained_tokenizer(make(tmp_path))
