"""The weights of a trained model: every live expert by its id, whole, in files that do not know ranks or slots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from dynmoe_ds.checkpoint.entries import Entry, entries, tied_names
from dynmoe_ds.checkpoint.publish import check_vacant, published
from dynmoe_ds.config.build import build_router_config
from dynmoe_ds.config.load import to_plain
from dynmoe_ds.distributed import assert_same_on_all_ranks, expert_parallel_group, raise_together
from dynmoe_ds.engine import Engine
from dynmoe_ds.engine.gathering import whole
from dynmoe_ds.errors import CheckpointError, ConfigError
from dynmoe_ds.export.manifest import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    LayerManifest,
    Manifest,
    read_manifest,
    write_manifest,
)
from dynmoe_ds.models import GatedSharedExpert, empty_model, shared_expert, shared_ffn_hidden_size
from dynmoe_ds.moe import MoELayer, Placement, moe_layers


def save_model(model: Engine | nn.Module, folder: str | Path) -> None:
    """Write the weights of a model with `MoELayer`s, as its next forward would use them, into a new folder.

    model: an engine, at any ZeRO stage, or a module. `model.safetensors` holds every tensor of the state dict in its
    own dtype: experts and router rows by expert id without the free slots, tied parameters once. `manifest.json` holds
    what else is needed to build the model again. The folder appears as a whole, by one rename, or not at all. Optimiser
    state is not in it.

    Rank 0 gathers the model in host memory, one parameter at a time.
    Collective: every rank. Raises: CheckpointError if `folder` is in use or cannot be written, on rank 0, and a
    DivergenceError that quotes it on the others; DivergenceError on every rank if their models differ.
    """
    module = model.module if isinstance(model, Engine) else model
    folder, is_writer = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    error: Exception | None = None
    try:
        manifest, stored = describe_model(module), entries(module)
        if is_writer:
            check_vacant(folder)
    except Exception as e:
        error = e
    raise_together(error)
    assert_same_on_all_ranks("the model to save", _fingerprint(manifest, stored))

    tensors, error = _collect(stored, is_writer)
    if is_writer and error is None:
        try:
            _write(manifest, tensors, folder)
        except Exception as e:
            error = e
    raise_together(error)


def load_model(folder: str | Path, ep_size: int = 1, num_slots: int | None = None) -> PreTrainedModel:
    """The decoder, or vision-language model, that `save_model` wrote: on the CPU, evaluating, in its own dtype.

    ep_size: how many neighbouring ranks share its experts. num_slots: the size of every layer's pool, for experts to
    come; None takes the least that holds the layer's experts. Experts keep their ids.

    Collective if `ep_size` is above 1: every rank. Raises: CheckpointError, naming the file, for one that is missing,
    damaged, of another format or of a model of another kind; ConfigError for sizes that cannot work. With
    `ep_size` above 1 one rank's error is raised on every rank.
    """
    model, error = None, None
    try:
        model = _load(Path(folder), ep_size, num_slots)
    except Exception as e:
        error = e
    if ep_size > 1:
        raise_together(error)
    elif error is not None:
        raise error
    assert model is not None
    return model


def describe_model(module: nn.Module) -> Manifest:
    """What is needed, beside the weights, to build a model again, from this rank's point of view.

    Raises: CheckpointError for experts that are spread over ranks where there are none.
    """
    layers = moe_layers(module)
    for name, layer in layers.items():
        if layer.ep_size > 1 and not dist.is_initialized():
            raise CheckpointError(
                f"{name} has ep_size {layer.ep_size} but torch.distributed is not initialised, so that the experts of "
                "the other ranks cannot be gathered. Call dynmoe_ds.initialize first."
            )
        if layer.tp_size > 1:
            raise CheckpointError(
                f"{name} is in a model with tensor parallelism, which cannot be saved yet: a shard of a parameter "
                "would be taken for the whole."
            )
    kind, config = _without_layers(module)
    return Manifest(
        model_class=kind.__name__,
        config=config,
        layers={name: describe_layer(layer, config or {}) for name, layer in layers.items()},
        tied=tied_names(module),
    )


def _without_layers(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any] | None]:
    """The class and configuration of the model whose MLPs' places the layers take."""
    kind = type(module)
    if not isinstance(module, PreTrainedModel):
        return kind, None
    config: dict[str, Any] = json.loads(module.config.to_json_string(use_diff=False))
    parent: Any = getattr(kind, "parent_class", None)
    if parent is None:
        return kind, config
    # Of `export_hugging_face`, whose configuration describes the layers; here the manifest does.
    own = ("moe_layers", "output_bias", "architectures")
    plain = {key: value for key, value in config.items() if key not in own}
    return parent, plain | {"model_type": parent.config_class.model_type}


def _fingerprint(manifest: Manifest, stored: list[Entry]) -> dict[str, Any]:
    """What must be equal on all ranks, by names that tell a person where to look."""
    values = {f"{name}.{key}": value for name, layer in manifest.layers.items() for key, value in asdict(layer).items()}
    tensors = {
        entry.key: {"shape": list(getattr(entry.tensor, "ds_shape", entry.tensor.shape)), "slots": entry.slots}
        for entry in stored
    }
    return {"class": manifest.model_class, "config": manifest.config, "tied": manifest.tied, **values, **tensors}


def describe_layer(layer: MoELayer, config: Mapping[str, Any]) -> LayerManifest:
    return LayerManifest(
        hidden_size=layer.hidden_size,
        ffn_hidden_size=layer.ffn_hidden_size,
        expert=layer.expert_kind,
        router=to_plain(layer.router.config),
        expert_ids=layer.placement.live_ids,
        next_expert_id=layer.placement.next_id,
        seed=layer.seed,
        has_shared=layer.shared is not None,
        shared_ffn_hidden_size=shared_ffn_hidden_size(layer.shared, config),
        shared_is_gated=isinstance(layer.shared, GatedSharedExpert),
    )


def _collect(stored: list[Entry], is_writer: bool) -> tuple[dict[str, Tensor], Exception | None]:
    """On the writer every tensor by its name, in host memory, or what went wrong there. Collective: every rank."""
    tensors: dict[str, Tensor] = {}
    error: Exception | None = None
    for entry in stored:
        with whole(entry.tensor) as local:
            parts = _gathered(local, entry.layer)
            if is_writer and error is None:
                try:
                    tensors |= _to_host(entry, parts)
                except Exception as e:  # out of memory, say: the other ranks are on their way to the next entry
                    error = e
    return tensors, error


def _gathered(local: Tensor, layer: MoELayer | None) -> list[Tensor]:
    """The tensor as the ranks of the first expert-parallel group hold it, on rank 0; elsewhere nothing of use.

    Collective: the expert-parallel group.
    """
    if layer is None or layer.ep_size == 1:
        return [local]
    group = layer.ep_group or expert_parallel_group(layer.ep_size)
    leader = dist.get_process_group_ranks(group)[0]
    if leader != 0:
        return []  # a replica of the first group
    parts = [torch.empty_like(local) for _ in range(layer.ep_size)] if dist.get_rank() == leader else None
    dist.gather(local.contiguous(), parts, dst=leader, group=group)
    return parts or []


def _to_host(entry: Entry, parts: list[Tensor]) -> dict[str, Tensor]:
    """Copies, by their names in the file, that share no memory, as safetensors wants them."""
    if entry.slots is None:
        return {entry.key: parts[0].to("cpu", copy=True).contiguous()}
    per_rank = len(parts[0])
    rows = {name: parts[slot // per_rank][slot % per_rank] for name, slot in entry.slots.items()}
    return {name: row.to("cpu", copy=True).contiguous() for name, row in rows.items()}


def _write(manifest: Manifest, tensors: Mapping[str, Tensor], folder: Path) -> None:
    try:
        with published(folder) as aside:
            write_manifest(manifest, aside / MANIFEST_FILE)
            save_file(dict(tensors), aside / WEIGHTS_FILE, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The model cannot be written to {folder}: {error}. Nothing is left of it.") from error


def _load(folder: Path, ep_size: int, num_slots: int | None) -> PreTrainedModel:
    path = folder / MANIFEST_FILE
    model = build_model(read_manifest(path), path, ep_size, num_slots)
    _fill(model, folder / WEIGHTS_FILE)
    return model.eval()


def build_model(manifest: Manifest, path: Path, ep_size: int = 1, num_slots: int | None = None) -> PreTrainedModel:
    """The model that the manifest at `path` describes, with its layers and placements; `fill` gives it its weights.

    Until then the parameters outside of layers have no memory: FFNs whose places layers take never do.
    Raises: CheckpointError for one of another kind than load_model knows, ConfigError for sizes that cannot work.
    """
    kind = getattr(transformers, manifest.model_class, None)
    if manifest.config is None or not (isinstance(kind, type) and issubclass(kind, GenerationMixin)):
        raise CheckpointError(
            f"{path} describes a {manifest.model_class}, but load_model builds transformers' models that write text "
            f"only. Build the model in your own code and read {WEIGHTS_FILE} with safetensors."
        )
    model: PreTrainedModel = empty_model(kind, dict(manifest.config))
    for name, described in manifest.layers.items():
        layer = build_layer(name, described, path, ep_size, num_slots)
        layer.shared = shared_expert(model.config, described.shared_ffn_hidden_size, is_gated=described.shared_is_gated)
        model.set_submodule(name, layer)
    return model


def build_layer(name: str, described: LayerManifest, path: Path, ep_size: int, num_slots: int | None) -> MoELayer:
    num_live = len(described.expert_ids)
    if described.has_shared and not described.shared_ffn_hidden_size:
        raise CheckpointError(
            f"{path}: {name} has a module that all tokens pass beside its experts (MoELayer's `shared`), but no MLP as "
            f"Llama's, so load_model cannot build it. Build the model in your own code and read {WEIGHTS_FILE} with "
            "safetensors."
        )
    if num_slots is None:
        num_slots = -(-num_live // max(ep_size, 1)) * max(ep_size, 1)
    if num_slots < num_live:
        raise ConfigError(f"num_slots is {num_slots} but {name} has {num_live} experts. Use {num_live} or more.")
    try:
        router = build_router_config(described.router)
    except ConfigError as error:
        raise CheckpointError(f"{path}: the router of {name} cannot be built. {error}") from error
    layer = MoELayer(
        hidden_size=described.hidden_size,
        ffn_hidden_size=described.ffn_hidden_size,
        num_experts=num_live,
        num_slots=num_slots,
        ep_size=ep_size,
        router=router,
        expert=described.expert,
        seed=described.seed,
    )
    # The layer has experts 0, 1, … spread over its pool: the saved ones take their places.
    ids = tuple(None if id_ is None else described.expert_ids[id_] for id_ in layer.placement.expert_ids)
    layer.placement = Placement(expert_ids=ids, next_id=described.next_expert_id, ep_size=ep_size)
    return layer


@torch.no_grad()
def fill(stored: Iterable[Entry], read: Callable[[str, torch.Size], Tensor]) -> None:
    """Give these parameters and buffers of this rank the values that `read` gives by name and shape.

    Parameters take the dtype of what is read; free slots hold zeros.
    """
    for entry in stored:
        value = _value(entry, read)
        if entry.tensor.is_meta:
            torch.utils.swap_tensors(entry.tensor, nn.Parameter(value, requires_grad=entry.tensor.requires_grad))
        elif isinstance(entry.tensor, nn.Parameter):
            entry.tensor.data = value
        else:
            entry.tensor.copy_(value)


def _fill(model: nn.Module, path: Path) -> None:
    """`fill` from the file at `path`."""
    stored = entries(model)
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path, {name for entry in stored for name in entry.names()}, set(file.keys()))
            fill(stored, lambda name, shape: _read(file, path, name, shape))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, damaged or was cut off: {error}. Copy the folder again.") from error


def _check_names(path: Path, wanted: set[str], present: set[str]) -> None:
    if wanted != present:
        lacks = f"it lacks {len(wanted - present)} tensors" if wanted - present else "it has too many tensors"
        raise CheckpointError(
            f"{path} does not belong to the {MANIFEST_FILE} beside it: {lacks}, such as "
            f"{min(wanted - present or present - wanted)}. Copy both files from one folder."
        )


def _value(entry: Entry, read: Callable[[str, torch.Size], Tensor]) -> Tensor:
    """This rank's tensor; free slots hold zeros."""
    if entry.slots is None:
        value = read(entry.key, entry.tensor.shape)
    else:
        row_shape, first = entry.tensor.shape[1:], entry.layer.local_slots.start if entry.layer is not None else 0
        dtype = read(next(iter(entry.slots)), row_shape).dtype
        value = torch.zeros(entry.tensor.shape, dtype=dtype)
        for name, slot in entry.slots.items():
            if 0 <= slot - first < len(value):
                value[slot - first] = read(name, row_shape)
    return value


def _read(file: Any, path: Path, name: str, shape: torch.Size) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if tensor.shape != shape:
        raise CheckpointError(
            f"{path} does not belong to the {MANIFEST_FILE} beside it: {name} has shape {list(tensor.shape)}, not "
            f"{list(shape)}. Copy both files from one folder."
        )
    return tensor
