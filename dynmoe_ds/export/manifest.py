"""The manifest of a saved model: what is needed, beside the weights, to build it again. Readable JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynmoe_ds.checkpoint.json_manifest import manifest_header, read_json_manifest
from dynmoe_ds.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "dynmoe_ds.model"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerManifest:
    """One `MoELayer`. router: name and values, as in a run's configuration. expert_ids: the live experts, ascending.

    has_shared: whether a module stands beside the experts. shared_ffn_hidden_size: its hidden units if it is an MLP as
    Llama's, behind a gate as Qwen2-MoE's if shared_is_gated; a module of another kind, 0 here, is described nowhere.
    """

    hidden_size: int
    ffn_hidden_size: int
    expert: str
    router: Mapping[str, Any]
    expert_ids: tuple[int, ...]
    next_expert_id: int
    seed: int
    has_shared: bool = False
    shared_ffn_hidden_size: int = 0
    shared_is_gated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A whole model.

    model_class: the class of the backbone. config: its Hugging Face configuration; None for a model without one.
    layers: by name. tied: further names of parameters, each with the name under which the parameter is saved.
    """

    model_class: str
    config: Mapping[str, Any] | None
    layers: Mapping[str, LayerManifest]
    tied: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """What stands in the file."""
        return manifest_header(FORMAT, FORMAT_VERSION) | asdict(self)


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest of a model."""
    path.write_text(json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises: CheckpointError, naming the file, if it is missing, damaged or of another format.
    """
    plain = read_json_manifest(path, FORMAT, FORMAT_VERSION, kind="model", advice="Copy the whole folder again.")
    try:
        return Manifest(
            model_class=plain["model_class"],
            config=plain["config"],
            layers={name: _layer(layer) for name, layer in plain["layers"].items()},
            tied=plain["tied"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__} {error}. Copy the whole folder again."
        ) from error


def _layer(plain: Mapping[str, Any]) -> LayerManifest:
    return LayerManifest(**{**plain, "expert_ids": tuple(plain["expert_ids"])})
