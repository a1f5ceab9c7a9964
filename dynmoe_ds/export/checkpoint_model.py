"""The model in a checkpoint of training, in one process: for use while the run goes on, or after it died."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynmoe_ds.checkpoint.entries import Entry, entries
from dynmoe_ds.checkpoint.store import Checkpoint
from dynmoe_ds.errors import CheckpointError
from dynmoe_ds.export.manifest import LayerManifest, Manifest
from dynmoe_ds.export.model import build_model, fill

_WEIGHT = "/weight"  # beside `/exp_avg` and others, of the same name
_BYTES_AT_ONCE = 2**30


def load_checkpoint_model(
    checkpoint: Checkpoint, manifest: Manifest, path: Path, dtype: torch.dtype
) -> PreTrainedModel:
    """The model of a checkpoint: on the CPU, evaluating, with the experts that are live there in pools without more.

    manifest: of the run's model, which stands at `path`; experts and their ids are the checkpoint's. dtype: what
    parameters are cast to, as an engine that goes on from the checkpoint computes with them; masters are in float32.
    Raises: CheckpointError for a checkpoint of another model, or one that cannot be read.
    """
    described: Mapping[str, Mapping[str, Any]] = checkpoint.manifest["layers"]
    if described.keys() != manifest.layers.keys():
        raise CheckpointError(
            f"{checkpoint.path} is of another model than {path}: its MoE layers are {', '.join(described) or 'none'}, "
            f"not {', '.join(manifest.layers) or 'none'}."
        )
    layers = {name: _with_experts(layer, described[name]) for name, layer in manifest.layers.items()}
    model = build_model(replace(manifest, layers=layers), path)
    stored = entries(model)
    wanted = {f"{name}{_WEIGHT}": shape for entry in stored for name, shape in _shapes(entry).items()}
    present = {name: size for name, size in checkpoint.sizes.items() if name.endswith(_WEIGHT)}
    if unlike := sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name)):
        raise CheckpointError(
            f"{checkpoint.path} is of another model than {path}: {len(unlike)} tensors are in one of the two alone, or "
            f"have other shapes, such as {unlike[0].removesuffix(_WEIGHT)}."
        )
    for part in _parts(stored):
        _fill(part, checkpoint, dtype)
    return model.eval()


def _fill(part: Sequence[Entry], checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    params = {name for entry in part if isinstance(entry.tensor, nn.Parameter) for name in entry.names()}
    tensors = checkpoint.read_alone([f"{name}{_WEIGHT}" for entry in part for name in entry.names()])

    def read(name: str, _: torch.Size) -> Tensor:
        value = tensors[f"{name}{_WEIGHT}"]
        return value.to(dtype) if name in params else value  # buffers, such as a budget's, keep their own

    fill(part, read)


def _with_experts(layer: LayerManifest, described: Mapping[str, Any]) -> LayerManifest:
    """The layer with the experts that it has in the checkpoint."""
    live = tuple(sorted(id_ for id_ in described["expert_ids"] if id_ is not None))
    return replace(layer, expert_ids=live, next_expert_id=described["next_expert_id"], seed=described["seed"])


def _shapes(entry: Entry) -> dict[str, torch.Size]:
    """The shapes of what stands in the checkpoint."""
    shape = entry.tensor.shape
    return dict.fromkeys(entry.names(), shape if entry.slots is None else shape[1:])


def _parts(stored: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries in parts whose masters fit into memory beside the model."""
    part: list[Entry] = []
    size = 0
    for entry in stored:
        part.append(entry)
        size += 4 * entry.tensor.numel()
        if size > _BYTES_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part
