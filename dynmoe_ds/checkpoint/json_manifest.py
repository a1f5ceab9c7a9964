"""Manifests: readable JSON files that say what a folder is, in which format, and what belongs to it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from dynmoe_ds.errors import CheckpointError


def read_json_manifest(path: Path, format_name: str, version: int, *, kind: str, advice: str) -> dict[str, Any]:
    """The content of a manifest of a format. kind: what it describes; advice: what to do about one that is damaged.

    Raises: CheckpointError, naming the file, if it is missing, damaged, or of another format or version.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Give the folder of a {kind}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or was cut off: {error}. {advice}") from error
    if not isinstance(plain, dict) or plain.get("format") != format_name:
        raise CheckpointError(
            f"{path} is no manifest of a {kind}: its `format` is not {format_name!r}. Give another folder."
        )
    if plain.get("format_version") != version:
        raise CheckpointError(
            f"{path} has format version {plain.get('format_version')}, but this dynmoe_ds reads version {version}. Use "
            f"the dynmoe_ds that wrote it ({plain.get('dynmoe_ds_version')})."
        )
    return plain


def manifest_header(format_name: str, version: int) -> dict[str, Any]:
    """What every manifest begins with."""
    return {"format": format_name, "format_version": version, "dynmoe_ds_version": _own_version()}


def _own_version() -> str | None:
    """None where the package is used without being installed."""
    try:
        return importlib.metadata.version("dynmoe-ds")
    except importlib.metadata.PackageNotFoundError:
        return None
