import pytest
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import TextDataConfig
from dynmoe_ds.data import from_rank_zero, load_text_data
from dynmoe_ds.data.text import read_text
from dynmoe_ds.errors import DataError, DynMoEError


def _config(**changes) -> TextDataConfig:
    values = {"name": "text_file", "vocab_size": 260, "sequence_length": 128, "held_out_every": 4}
    return TextDataConfig(**{**values, **changes})


def _error_of(make) -> str:
    try:
        from_rank_zero(make)
    except DynMoEError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _on_rank(rank: int, world_size: int, bad_path: str) -> dict:
    def refuse():
        raise DataError("Not this text. Take another.")

    calls: list[int] = []
    data = load_text_data(_config(name="pydoc_topics"))
    return {
        "value": from_rank_zero(lambda: calls.append(rank) or f"made on {rank}"),
        "calls": calls,
        "refused": _error_of(refuse),
        "broken": _error_of(lambda: {}["key"]),
        "not UTF-8": _error_of(lambda: read_text(_config(path=bad_path))),
        "tokenizer": data.tokenizer_json,
        "tokens": data.train.tokens,
    }


def test_every_rank_gets_what_rank_0_made_and_its_errors(tmp_path):
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"\xe4")
    first, second = run_ranks(_on_rank, 2, str(bad))
    assert first["value"] == second["value"] == "made on 0"
    assert (first["calls"], second["calls"]) == ([0], [])
    assert first["refused"] == second["refused"] == "DataError: Not this text. Take another."
    assert first["broken"] == second["broken"] == "DynMoEError: Rank 0 failed: KeyError('key')"
    assert first["not UTF-8"] == second["not UTF-8"]
    assert "not UTF-8: byte 0xe4 at offset 0" in second["not UTF-8"]
    assert first["tokenizer"] == second["tokenizer"]
    assert first["tokens"].equal(second["tokens"])


def test_without_ranks_it_is_a_plain_call():
    assert from_rank_zero(lambda: 3) == 3
    with pytest.raises(KeyError):
        from_rank_zero(lambda: {}["key"])
