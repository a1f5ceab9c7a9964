"""From an image of any size to the model's input: the crops of DeiT, without further augmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Per channel, of ImageNet: what pretrained models expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA_SHARES, ASPECT_RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)
# The share of the resized image's side that the centre crop keeps: 224 of 256.
CENTRE_SHARE = 224 / 256
_ATTEMPTS = 10

Box = tuple[int, int, int, int]


def training_view(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random part of the image, resized to `size` x `size`, and mirrored every other time.

    Source: RandomResizedCrop and RandomHorizontalFlip of torchvision, as DeiT uses them (arXiv 2012.12877).
    """
    part = image.crop(random_box(image.width, image.height, rng))
    resized = part.resize((size, size), Image.Resampling.BICUBIC)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else resized


def evaluation_view(image: Image.Image, size: int) -> Image.Image:
    """The centre `size` x `size` of the image, resized so that its shorter side is `size` / CENTRE_SHARE.

    Source: Resize and CenterCrop of torchvision, as DeiT uses them.
    """
    shorter = int(size / CENTRE_SHARE)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """(left, top, right, bottom) of a random part of an image: 8 to 100 % of its area, 3:4 to 4:3 wide.

    Where none that fits is drawn in ten attempts, it is the largest centred part within these ratios.
    """
    narrowest, widest = ASPECT_RATIOS
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*AREA_SHARES)
        ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * widest)), min(height, round(width / narrowest))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def padded_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The whole image in the middle of a square of its longer side, with `colour` (0 to 255 per channel) beside it.

    Source: LLaVA 1.5, so that nothing of a picture is cut off or distorted.
    """
    side = max(image.size)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def normalised(image: Image.Image, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """[3, H, W] float32 of an RGB image, each channel less its mean and over its standard deviation."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
