"""How images are normalised: what transformers' image processors write into a tower's folder is what is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPProcessor, SiglipImageProcessorPil

from dynmoe_ds.data import ImageInput, read_image_statistics, read_picture
from dynmoe_ds.data.digit_questions import digit_tokenizer
from dynmoe_ds.errors import ConfigError

SQUARE = {"height": 24, "width": 24}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SQUARE),
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SQUARE, image_mean=MEAN, image_std=STD, resample=2),
        SiglipImageProcessorPil(size=SQUARE),
        SiglipImageProcessorPil(size=SQUARE, do_normalize=False, image_mean=MEAN),
        SiglipImageProcessorPil(size=SQUARE, do_rescale=False, image_mean=[100, 110, 120], image_std=[60, 70, 80]),
        SiglipImageProcessorPil(size=SQUARE, rescale_factor=1 / 127.5, image_mean=[1, 1, 1], image_std=[1, 1, 1]),
    ],
    ids=["CLIP", "CLIP with values of its own", "SigLIP", "not normalised", "not rescaled", "from -1 to 1"],
)
def test_square_pictures_become_what_the_processor_makes_of_them(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    statistics = read_image_statistics(f"{tmp_path}", 24)
    assert statistics is not None
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    wanted = ImageInput(size=24, num_tokens=1, mean=statistics.mean, std=statistics.std, resample=statistics.resample)
    want = torch.as_tensor(processor(picture, return_tensors="pt").pixel_values[0])
    torch.testing.assert_close(read_picture(tmp_path / "picture.png", wanted), want.float(), rtol=1e-5, atol=1e-5)


def test_what_newer_transformers_write_and_nothing_at_all(tmp_path: Path) -> None:
    assert read_image_statistics(f"{tmp_path}", 24) is None
    image = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SQUARE, image_mean=MEAN)
    CLIPProcessor(image, digit_tokenizer()).save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").exists() and not (tmp_path / "preprocessor_config.json").exists()
    found = read_image_statistics(f"{tmp_path}", 24)
    assert found is not None and found.mean == tuple(MEAN)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert read_image_statistics(f"{tmp_path}", 24) is None


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"crop_size": 32}, r"crop_size is 32, but data.image_size is 24. Correct it, or take it away"),
        ({"size": {"height": 24, "width": 30}}, r"size is \{'height': 24, 'width': 30\}, but data.image_size is 24"),
        ({"image_mean": [0.5]}, r"ValueError not enough values to unpack"),
        (
            {"image_std": [0.5, 0.5, 0.0]},
            r"image_std is \[0.5, 0.5, 0.0\] and rescale_factor .*, but they must be above 0",
        ),
        ({"image_mean": None}, r"TypeError"),
        ({"resample": 9}, r"9 is not a valid Resampling"),
        ({"rescale_factor": 0}, r"rescale_factor 0, but they must be above 0"),
        ([], r"AttributeError"),
    ],
)
def test_files_that_cannot_be_used(told: Any, message: str, tmp_path: Path) -> None:
    whole = {"image_mean": MEAN, "image_std": STD}
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(whole | told if isinstance(told, dict) else told))
    with pytest.raises(ConfigError, match=rf"preprocessor_config.json cannot be used: .*({message})"):
        read_image_statistics(f"{tmp_path}", 24)
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot be used: JSONDecodeError"):
        read_image_statistics(f"{tmp_path}", 24)
    file.write_text(json.dumps({"image_std": STD}))
    with pytest.raises(ConfigError, match="cannot be used: KeyError 'image_mean'"):
        read_image_statistics(f"{tmp_path}", 24)


def test_a_size_that_is_cropped_afterwards_does_not_matter(tmp_path: Path) -> None:
    told = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 30}, "crop_size": SQUARE}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    assert read_image_statistics(f"{tmp_path}", 24) is not None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | {"do_center_crop": False}))
    with pytest.raises(ConfigError, match=r"size is .*30"):
        read_image_statistics(f"{tmp_path}", 24)
