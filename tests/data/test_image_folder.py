from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.helpers.images import write_images
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import ImageFolderConfig
from dynmoe_ds.data.image_folder import load_image_folder
from dynmoe_ds.data.image_transforms import evaluation_view, normalised
from dynmoe_ds.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path)
    return tmp_path


def _load(folder: Path | None, seed: int = 0) -> Any:
    return load_image_folder(ImageFolderConfig(path=None if folder is None else str(folder), image_size=8), seed)


def test_classes_and_files_are_in_alphabetical_order(folder):
    (folder / "train/blue/notes.txt").write_text("no image")
    (folder / "train/red/last.JPEG").write_bytes((folder / "train/red/000.jpg").read_bytes())
    data = _load(folder)
    assert data.classes == ("blue", "red")
    assert [file.name for file in data.train.files] == [
        *("000.jpg", "001.png", "002.jpg", "003.png"),
        *("000.jpg", "001.png", "002.jpg", "003.png", "last.JPEG"),
    ]
    assert data.train.labels == (0,) * 4 + (1,) * 5
    assert len(data.held_out) == 6 and data.held_out.labels == (0,) * 3 + (1,) * 3


def test_evaluation_batches_are_the_centre_views(folder):
    examples = _load(folder).held_out
    batch = examples.batch([4, 0])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    with Image.open(folder / "val/red/001.png") as image:
        assert torch.equal(batch["pixel_values"][0], normalised(evaluation_view(image.convert("RGB"), 8)))
    red, blue = batch["pixel_values"].mean((2, 3))
    assert red[0] > blue[0] and red[2] < blue[2]


def test_training_views_depend_on_seed_epoch_and_index_alone(folder):
    def view(index: int, epoch: int, seed: int = 0, before: tuple[int, ...] = ()) -> torch.Tensor:
        indices = [*before, index]
        return _load(folder, seed).train.batch(indices, epochs=[epoch] * len(indices))["pixel_values"][-1]

    first = view(1, epoch=2)
    assert torch.equal(view(1, epoch=2, before=(5, 0, 3)), first), "the place in a batch does not matter"
    assert not torch.equal(view(1, epoch=3), first)
    assert not torch.equal(view(1, epoch=2, seed=1), first)
    assert not torch.equal(_load(folder).train.batch([1])["pixel_values"][0], first)
    (folder / "train/blue/002.jpg").write_bytes((folder / "train/blue/000.jpg").read_bytes())
    assert not torch.equal(view(2, epoch=0), view(0, epoch=0)), "equal images have crops of their own"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode, folder):
    with Image.open(folder / "val/blue/001.png") as image:
        converted = image.convert("L").convert(mode) if mode == "LA" else image.convert(mode)
    converted.save(folder / "val/blue/000.jpg", format="TIFF")
    assert _load(folder).held_out.batch([0])["pixel_values"].shape == (1, 3, 8, 8)


def _truncated(folder: Path) -> Path:
    file = folder / "train/red/001.png"
    file.write_bytes(file.read_bytes()[:-200])
    return file


def _text(folder: Path) -> Path:
    file = folder / "train/red/001.png"
    file.write_text("no image")
    return file


def _gone(folder: Path) -> Path:
    file = folder / "train/red/001.png"
    file.unlink()
    return file


@pytest.mark.parametrize("damage", [_truncated, _text, _gone])
def test_an_unreadable_image_is_named(damage, folder):
    data = _load(folder)
    file = damage(folder)
    data.train.batch([4], epochs=[0])
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        data.train.batch([4, 5], epochs=[0, 0])
    assert str(file) in str(caught.value)


def _without_val(folder: Path) -> None:
    shutil.rmtree(folder / "val")


def _other_classes(folder: Path) -> None:
    (folder / "val/red").rename(folder / "val/green")


def _without_classes(folder: Path) -> None:
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


def _empty_class(folder: Path) -> None:
    for file in (folder / "val/blue").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_val, r"There is no folder .*/val \(seen from .*Set data.path"),
        (_other_classes, "must have the same classes, but only one of them has green, red"),
        (_without_classes, "train has no folders of classes"),
        (_empty_class, r"val has no \.jpg, \.jpeg, \.png files for blue"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(spoil, message, folder):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        _load(folder)


def test_a_path_is_needed():
    with pytest.raises(DataError, match=r"data\.path is not set"):
        _load(None)


def _on_rank(rank: int, world_size: int, folder: Path) -> Any:
    data = _load(folder if rank == 0 else Path("/nowhere"))
    try:
        _load(Path("/nowhere") if rank == 0 else folder)
    except DataError as error:
        return data.train.batch([0, 7], epochs=[1, 2])["pixel_values"], str(error)


def test_rank_0_lists_for_all_and_its_errors_reach_all(folder):
    (first, error), (second, other_error) = run_ranks(_on_rank, 2, folder)
    assert torch.equal(first, second)
    assert error == other_error and "There is no folder /nowhere/train" in error
