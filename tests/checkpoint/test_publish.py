from pathlib import Path

import pytest

from dynmoe_ds.checkpoint import publish
from dynmoe_ds.checkpoint.publish import published


def test_a_folder_appears_only_when_all_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    with published(folder) as aside:
        (aside / "first").write_text("1")
        assert not folder.exists()
        (aside / "second").write_text("2")
    assert sorted(file.name for file in folder.iterdir()) == ["first", "second"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_error_half_way_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), published(tmp_path / "model") as aside:
        (aside / "first").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_no_part_of_the_next_attempt(tmp_path: Path) -> None:
    left = tmp_path / ".model.incomplete"
    left.mkdir()
    (left / "half").write_text("")
    with published(tmp_path / "model") as aside:
        (aside / "first").write_text("1")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["first"]
    assert not left.exists()


def test_a_folder_takes_the_place_of_one_that_is_there(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with published(tmp_path / "model") as aside:
            (aside / text).write_text(text)
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "new"]


def test_everything_is_on_the_disk_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []
    folder, ordinary = tmp_path / "model", publish.flush

    def flush(path: Path) -> None:
        flushed.append((path.name, folder.exists()))
        ordinary(path)

    monkeypatch.setattr(publish, "flush", flush)
    with publish.published(folder) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "file").write_text("1")
    before, after = [[name for name, is_there in flushed if is_there == when] for when in (False, True)]
    assert sorted(before) == [".model.incomplete", "deep", "file"]
    assert after == [tmp_path.name], "then the name itself"
