"""Folders of checkpoints without an engine: which of them count, and how old ones go."""

from pathlib import Path

import pytest

from dynmoe_ds.checkpoint import store


def folder_of(tmp_path: Path, *steps: int) -> Path:
    for step in steps:
        path = tmp_path / store.checkpoint_name(step)
        path.mkdir()
        for name in (store.MANIFEST_FILE, store.SHARED_FILE):
            (path / name).write_text("{}")
    return tmp_path


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    store.remove_old(folder_of(tmp_path, 3, 12, 9), keep=2)
    assert list(store.list_checkpoints(tmp_path)) == [9, 12]


def test_one_that_is_half_removed_is_none_and_goes_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = store.shutil.rmtree

    def die_half_way(path: Path, ignore_errors: bool = False) -> None:
        if (path / store.SHARED_FILE).exists():
            (path / store.SHARED_FILE).unlink()
            raise KeyboardInterrupt
        ordinary(path, ignore_errors=ignore_errors)

    folder = folder_of(tmp_path, 3, 6)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", die_half_way)
        with pytest.raises(KeyboardInterrupt):
            store.remove_old(folder, keep=1)
    assert list(store.list_checkpoints(folder)) == [6]
    store.remove_old(folder, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000006"]
