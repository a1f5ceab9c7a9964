"""What several tests of conversations read."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dynmoe_ds.data.digit_questions import digit_tokenizer

WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a white picture, a red one, one that is none, and a tokenizer."""
    Image.new("RGB", (8, 8), WHITE).save(tmp_path / "white.png")
    Image.new("RGB", (8, 4), RED).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    digit_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path
