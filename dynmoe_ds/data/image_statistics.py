"""How a pretrained vision tower wants images, as its folder says in the files of transformers' image processors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dynmoe_ds.errors import ConfigError

IMAGE_PROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
_LEVELS = 255

Channels = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageStatistics:
    """mean, std: per channel, of values from 0 to 1, which images are normalised with. resample: PIL's number."""

    mean: Channels
    std: Channels
    resample: int = Image.Resampling.BICUBIC


def read_image_statistics(folder: str, image_size: int) -> ImageStatistics | None:
    """What the folder of a tower says; None if it says nothing.

    It is read from `preprocessor_config.json` (CLIPImageProcessor, SiglipImageProcessor and alike), or from the part
    `image_processor` of `processor_config.json`, where newer transformers write it.
    Raises: ConfigError for a file that cannot be used, or is for images of another size than `image_size`.
    """
    for name, part in ((IMAGE_PROCESSOR_FILE, None), (PROCESSOR_FILE, "image_processor")):
        file = Path(folder) / name
        if not file.is_file():
            continue
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            told = told if part is None else told.get(part)
            if told is not None:
                _check_size(told, image_size)
                return _statistics(told)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file} cannot be used: {type(error).__name__} {error}. Correct it, or take it away: then images are "
                "normalised as is usual for the kind of tower."
            ) from error
    return None


def _statistics(told: dict[str, Any]) -> ImageStatistics:
    """With what is done to values from 0 to 255 made one with what is done to those from 0 to 1."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if told.get("do_normalize", True):
        mean, std = _channels(told["image_mean"]), _channels(told["image_std"])
    factor = told.get("rescale_factor", 1 / _LEVELS) if told.get("do_rescale", True) else 1.0
    if min(*std, factor) <= 0:
        raise ValueError(f"image_std is {list(std)} and rescale_factor {factor}, but they must be above 0")
    scale = 1.0 if factor == 1 / _LEVELS else 1 / (_LEVELS * factor)
    resample = told.get("resample", Image.Resampling.BICUBIC)
    return ImageStatistics(
        mean=_channels([scale * value for value in mean]),
        std=_channels([scale * value for value in std]),
        resample=Image.Resampling(resample).value,
    )


def _channels(values: list[float]) -> Channels:
    red, green, blue = map(float, values)
    return red, green, blue


def _check_size(told: dict[str, Any], image_size: int) -> None:
    """Raises: ValueError for images of another size."""
    key = "crop_size" if "crop_size" in told and told.get("do_center_crop", True) else "size"
    size = told.get(key)
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if sides - {image_size, None}:
        raise ValueError(f"{key} is {size}, but data.image_size is {image_size}")
