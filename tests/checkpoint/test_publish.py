from pathlib import Path

import pytest

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
