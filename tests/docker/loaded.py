"""`docker/gpu_base.py` as a module: its folder is no package, and has the name of one on PyPI."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[2] / "docker/gpu_base.py"
_spec = importlib.util.spec_from_file_location("gpu_base", _PATH)
assert _spec is not None and _spec.loader is not None, _PATH
gpu_base = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_base)
