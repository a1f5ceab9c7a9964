"""Checkpoints of DynMoE's authors, in their DeepSpeed's layout, as models with `MoELayer`s."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dynmoe_ds.distributed import current_layout, raise_together
from dynmoe_ds.errors import CheckpointError, ConfigError
from dynmoe_ds.export.weight_files import FolderTensors, TensorViews, View
from dynmoe_ds.moe import MoELayer, Placement
from dynmoe_ds.moe.layer import layer_faults
from dynmoe_ds.moe.seeds import layer_seed
from dynmoe_ds.moe.upcycle import FFN, expert_kinds, find_ffns
from dynmoe_ds.routing import TopAnyConfig

M = TypeVar("M", bound=nn.Module)

_GATE = ("sim_matrix", "gates", "experts_mask", "temperature")
_LAYER_TENSOR = re.compile(
    rf"(?P<path>.+)\.deepspeed_moe\."
    rf"(?:gate\.wg\.(?P<gate>{'|'.join(_GATE)})|experts\.deepspeed_experts\.(?P<index>\d+)\.(?P<own>.+))"
)
_WEIGHT_OR_BIAS = {"w": "weight", "b": "bias"}
_MAX_LOG_TEMPERATURE = math.log(100.0)
_CONFIG_KEYS = {
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "norm_eps": "layer_norm_eps",
    "rms_norm_eps": "rms_norm_eps",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "partial_rotary_factor": "partial_rotary_factor",
    "rope_pct": "partial_rotary_factor",
    "rope_theta": "rope_theta",
}
"""What no tensor's shape shows of an architecture: names in a checkpoint's config.json, and in transformers'."""


def import_dynmoe_checkpoint(
    model: M,
    checkpoint: Mapping[str, Tensor] | str | Path,
    *,
    num_slots: int | None = None,
    ep_size: int = 1,
    renamed: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
    seed: int = 0,
) -> M:
    """`model` itself, a dense model of the architecture, with the checkpoint's weights and `MoELayer`s for its experts.

        model = AutoModelForCausalLM.from_config(StableLmConfig(...))
        dm.import_dynmoe_checkpoint(model, folder, num_slots=8, ignored=["model.mm_projector.", "model.image_tower."])

    It computes what the authors' code computes in evaluation. A layer's experts are those whose `experts_mask` is not
    0, each with its index as its id; the indices of masked ones are never used again. The router is
    `top_any_authors_code` with the checkpoint's temperature.

    checkpoint: tensors by name, or a folder with safetensors or `pytorch_model.bin`, whole or in shards, with or
    without an index; a `config.json` in it is compared with the model's in what the weights do not show (heads, norms'
    eps, rotary embeddings, activation). For every `mlp` with experts it holds `….mlp.deepspeed_moe.gate.wg.` sim_matrix
    [D, E], gates [E], experts_mask [E] and temperature [1], and `….mlp.deepspeed_moe.experts.deepspeed_experts.0.` to
    E − 1 with the names of the dense MLP. Every other tensor must be one of the model's.
    ignored: beginnings of names that are left out, such as the vision parts above, which a text model has not.
    renamed: what takes the place of the beginnings of other names, the longest that fits, for example
    `{"language_model.model.": "model."}`; `ignored` comes first. Nothing is renamed or left out without being asked.
    num_slots: slots per layer; None takes the least that holds the layer's experts. ep_size: as in `MoELayer`. seed:
    what is drawn for later experts is a function of it, of the layer and of the expert's id.

    Tensors take the dtype and the device of the model's parameters. Scores are compared with thresholds before the
    sigmoid, which the authors' float32 does after it: at most equal scores and thresholds show it.

    Collective if `ep_size` is above 1: every rank. Raises: CheckpointError, with names, for tensors that are missing,
    have no place or another shape, a layer without live experts, and files that cannot be read; ConfigError for a model
    whose FFNs no expert can replace, and sizes that cannot work. The model is unchanged then. With `ep_size` above 1
    one rank's error is raised on every rank.
    Source: the gate of `deepspeed/moe/sharded_moe.py` in the public code of arXiv 2405.14297. `temperature` is the
    logarithm of τ, which is at most 100; a token without an open gate takes the expert of the greatest score.
    """
    error: Exception | None = None
    plan: _Plan | None = None
    try:
        plan = _checked(model, checkpoint, num_slots, ep_size, renamed or {}, ignored)
    except Exception as e:
        error = e
    if ep_size > 1:
        raise_together(error)
    elif error is not None:
        raise error
    assert plan is not None
    for source in plan.layers:
        layer = _filled_layer(source, plan.tensors, num_slots, ep_size, seed)
        model.set_submodule(source.ffn.path, layer.train(source.ffn.block.training))
    with torch.no_grad():
        for name, target in plan.dense.items():
            target.copy_(plan.tensors[name])
    return model


@torch.no_grad()
def fill_dense_model(model: M, tensors: TensorViews) -> M:
    """`model` itself with the weights of a checkpoint without experts.

    Raises: CheckpointError, with names, for tensors that are missing, have no place or another shape; the model is
    unchanged then.
    """
    faults = _Faults()
    places = _dense_places(model, (), tensors, set(), faults)
    faults.raise_any(model)
    for name, target in places.items():
        target.copy_(tensors[name])
    return model


def has_experts(names: Iterable[str]) -> bool:
    """Whether tensors of such names are a checkpoint of DynMoE's."""
    return any(_LAYER_TENSOR.fullmatch(name) for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """A layer of the checkpoint: its experts `live` of `num_places` take the place of the model's `ffn`.

    own: the name of an expert's tensor in the checkpoint, by that of the expert's parameter here.
    """

    ffn: FFN
    kind: str
    own: Mapping[str, str]
    live: tuple[int, ...]
    num_places: int
    temperature: float

    def gate(self, name: str) -> str:
        """The full name of a tensor of the gate."""
        return f"{self.ffn.path}.deepspeed_moe.gate.wg.{name}"

    def expert(self, index: int, own: str) -> str:
        """The full name of an expert's tensor."""
        return f"{self.ffn.path}.deepspeed_moe.experts.deepspeed_experts.{index}.{own}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Everything that is to be done, found to be possible. dense: the model's tensor for each of these names."""

    tensors: TensorViews
    layers: tuple[_Source, ...]
    dense: Mapping[str, Tensor]


@dataclass(slots=True)
class _Faults:
    """What is wrong with a checkpoint, collected so that one error says it all."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def raise_any(self, model: nn.Module) -> None:
        """Raises: CheckpointError if there is a fault."""
        found = []
        if self.missing:
            found.append(
                f"It lacks {_listed(self.missing)}. Give all shards of one checkpoint, or `renamed` if other names "
                "begin differently."
            )
        if self.unexpected:
            found.append(
                f"The model has no place for {_listed(self.unexpected)}. Give a model of the checkpoint's "
                "architecture, or the beginnings of these names as `ignored` or `renamed`."
            )
        if self.shapes:
            found.append(f"Shapes differ: {_listed(self.shapes)}. Give a model of the checkpoint's sizes.")
        found += self.others
        if found:
            raise CheckpointError(f"The checkpoint does not fit {type(model).__name__}. " + " ".join(found))


def _checked(
    model: nn.Module,
    checkpoint: Mapping[str, Tensor] | str | Path,
    num_slots: int | None,
    ep_size: int,
    renamed: Mapping[str, str],
    ignored: Sequence[str],
) -> _Plan:
    """What is to be done. Raises: CheckpointError and ConfigError, as the import."""
    faults = _Faults()
    if isinstance(checkpoint, Mapping):
        stored: Mapping[str, Tensor] = checkpoint
    else:
        stored = FolderTensors(Path(checkpoint))
        faults.others += _config_faults(model, Path(checkpoint) / "config.json")
    tensors = TensorViews(stored, {new: View(name=name) for new, name in _new_names(stored, renamed, ignored).items()})

    found = {name: match for name in tensors if (match := _LAYER_TENSOR.fullmatch(name))}
    paths = list(dict.fromkeys(match["path"] for match in found.values()))
    if not paths:
        raise CheckpointError(
            "The checkpoint has no layer of DynMoE: no name contains .deepspeed_moe.gate.wg.sim_matrix or an expert. "
            f"Its names are {_listed(list(tensors))}. For a dense checkpoint use dynmoe_ds.upcycle."
        )
    ffns = {ffn.path: ffn for ffn in find_ffns(model).values() if not ffn.form.entry}
    if fused := [ffn for ffn in ffns.values() if ffn.form.is_fused]:
        raise ConfigError(
            f"{fused[0].path} has one linear, {fused[0].form.linears['1']}, for an expert's w1 and w3, and checkpoints "
            "of such models are not known. Give a model of StableLM, Qwen or Phi-2, for example."
        )
    for path in [path for path in paths if path not in ffns]:
        faults.unexpected += [name for name, match in found.items() if match["path"] == path]
    chosen = [ffn for path, ffn in ffns.items() if path in paths]
    layers = []
    for ffn, kind in zip(chosen, expert_kinds(chosen), strict=True):
        source = _source(ffn, kind, tensors, faults)
        if source is not None:
            layers.append(source)
    dense = _dense_places(model, chosen, tensors, set(found), faults)
    faults.raise_any(model)
    _check_sizes(layers, num_slots, ep_size)
    return _Plan(tensors=tensors, layers=tuple(layers), dense=dense)


def _new_names(names: Iterable[str], renamed: Mapping[str, str], ignored: Sequence[str]) -> dict[str, str]:
    """The names to be read, each by its new name. Raises: ConfigError for a prefix of no name, or two names in one."""
    new_names: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        left_out = [prefix for prefix in ignored if name.startswith(prefix)]
        fitting = max((prefix for prefix in renamed if name.startswith(prefix)), key=len, default=None)
        used.update(left_out)
        if left_out:
            continue
        new = name
        if fitting is not None:
            used.add(fitting)
            new = renamed[fitting] + name.removeprefix(fitting)
        if new in new_names:
            raise ConfigError(f"renamed gives both {new_names[new]} and {name} the name {new}. Leave one of them out.")
        new_names[new] = name
    if unused := [prefix for prefix in (*ignored, *renamed) if prefix not in used]:
        raise ConfigError(
            f"No name in the checkpoint that is still to be read begins with {_listed(unused)}, given in ignored or "
            "renamed. Leave it out, or correct it."
        )
    return new_names


def _source(ffn: FFN, kind: str, tensors: TensorViews, faults: _Faults) -> _Source | None:
    """A layer of the checkpoint; None, with its faults collected, if its gate is not whole."""
    own = {name: f"{ffn.form.linears[name[1:]]}.{_WEIGHT_OR_BIAS[name[0]]}" for name in ffn.parameters()}
    source = _Source(ffn=ffn, kind=kind, own=own, live=(), num_places=0, temperature=1.0)
    names = {part: source.gate(part) for part in _GATE}
    if missing := [name for name in names.values() if name not in tensors]:
        faults.missing += missing
        return None
    num_places = math.prod(tensors.shape(names["experts_mask"]))
    shapes = {
        "sim_matrix": (ffn.hidden_size, num_places),
        "gates": (num_places,),
        "experts_mask": (num_places,),
        "temperature": (1,),
    }
    fit = [_check_shape(tensors, names[part], shape, faults) for part, shape in shapes.items()]
    if not all(fit):
        return None
    mask = tensors[names["experts_mask"]].float()
    live = tuple(mask.nonzero().flatten().tolist())
    if not live:
        faults.others.append(f"{names['experts_mask']} is 0 for all {num_places} experts. At least one must be live.")
        return None
    if not bool((mask[list(live)] == 1).all()):
        faults.others.append(
            f"{names['experts_mask']} is {mask.tolist()} but must be 0 or 1, since the authors' gate multiplies by it."
        )
    temperature = math.exp(min(float(tensors[names["temperature"]]), _MAX_LOG_TEMPERATURE))
    source = replace(source, live=live, num_places=num_places, temperature=temperature)
    _check_experts(source, tensors, faults)
    return source


def _check_experts(source: _Source, tensors: TensorViews, faults: _Faults) -> None:
    """Collect what is wrong with a layer's experts; of masked ones only the names count."""
    expected = {own: source.ffn.parameters()[name].shape for name, own in source.own.items()}
    for index in source.live:
        for own, shape in expected.items():
            name = source.expert(index, own)
            if name in tensors:
                _check_shape(tensors, name, tuple(shape), faults)
            else:
                faults.missing.append(name)
    known = {source.expert(index, own) for index in range(source.num_places) for own in expected}
    start = source.ffn.path + ".deepspeed_moe.experts."
    faults.unexpected += [name for name in tensors if name.startswith(start) and name not in known]


def _dense_places(
    model: nn.Module, replaced: Sequence[FFN], tensors: TensorViews, in_layers: set[str], faults: _Faults
) -> dict[str, Tensor]:
    """The model's own tensor for every name outside of the layers with experts. Of tied ones one name is enough."""
    gone = tuple(f"{ffn.path}." for ffn in replaced)
    targets = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not name.startswith(gone)}
    given = {id(tensor) for name, tensor in targets.items() if name in tensors}
    faults.missing += [name for name, tensor in targets.items() if id(tensor) not in given]
    faults.unexpected += [name for name in tensors if name not in targets and name not in in_layers]
    first: dict[int, str] = {}
    for name, tensor in targets.items():
        if name in tensors:
            fits = _check_shape(tensors, name, tuple(tensor.shape), faults)
            other = first.setdefault(id(tensor), name)
            if fits and other != name and not torch.equal(tensors[other], tensors[name]):
                faults.others.append(
                    f"{other} and {name} are one parameter of the model but differ in the checkpoint. Build the model "
                    "with tie_word_embeddings=False."
                )
    return {name: targets[name] for name in first.values()}


def _check_shape(tensors: TensorViews, name: str, shape: tuple[int, ...], faults: _Faults) -> bool:
    """Whether the shape is as expected; if not, that is collected."""
    got = tensors.shape(name)
    if got != shape:
        faults.shapes.append(f"{name} {list(got)} where the model has {list(shape)}")
    return got == shape


def _config_faults(model: nn.Module, path: Path) -> list[str]:
    """Where a config.json beside the weights differs from the model's in what the weights do not show."""
    if not path.exists():
        return []
    try:
        plain = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}. Copy the folder again.") from error
    config = getattr(model, "config", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    found = []
    for key, own in _CONFIG_KEYS.items():
        value = rotary.get(own, getattr(config, own, None))
        if plain.get(key) is not None and value is not None and plain[key] != value:
            found.append(f"{path} has {key} {plain[key]} but the model's {own} is {value}. Build the model with it.")
    return found


def _check_sizes(layers: Sequence[_Source], num_slots: int | None, ep_size: int) -> None:
    """Raises: ConfigError for a pool that cannot hold a layer's experts, or does not fit the ranks."""
    faults = []
    for source in layers:
        num_live = len(source.live)
        slots = _slots(num_live, num_slots, ep_size)
        if slots < num_live:
            faults.append(f"num_slots is {slots} but {source.ffn.path} has {num_live} experts. Use {num_live} or more.")
        else:
            faults += layer_faults(num_experts=num_live, num_slots=slots, ep_size=ep_size)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    current_layout(ep_size)  # raises if the ranks do not fit


def _slots(num_live: int, num_slots: int | None, ep_size: int) -> int:
    """The size of a pool: as asked, or the smallest multiple of `ep_size` that holds the experts."""
    ranks = max(ep_size, 1)
    return -(-num_live // ranks) * ranks if num_slots is None else num_slots


@torch.no_grad()
def _filled_layer(
    source: _Source, tensors: Mapping[str, Tensor], num_slots: int | None, ep_size: int, seed: int
) -> MoELayer:
    ffn, live = source.ffn, source.live
    weight = ffn.linear("1").weight
    layer = MoELayer(
        hidden_size=ffn.hidden_size,
        ffn_hidden_size=ffn.ffn_hidden_size,
        num_experts=len(live),
        num_slots=_slots(len(live), num_slots, ep_size),
        ep_size=ep_size,
        router=replace(TopAnyConfig.authors_code(), temperature=source.temperature),
        expert=source.kind,
        seed=layer_seed(seed, ffn.index),
    ).to(device=weight.device, dtype=weight.dtype)
    # The layer has experts 0, 1, … spread over its pool: the imported ones take their places.
    ids = tuple(None if id_ is None else live[id_] for id_ in layer.placement.expert_ids)
    layer.placement = Placement(expert_ids=ids, next_id=source.num_places, ep_size=ep_size)
    rows, thresholds = tensors[source.gate("sim_matrix")].T, tensors[source.gate("gates")]
    first = layer.local_slots.start
    for index, slot in layer.placement.slots_by_id.items():
        layer.router.weight[slot] = rows[index]
        layer.router.get_parameter("threshold")[slot] = thresholds[index]
        if slot in layer.local_slots:
            for name, own in source.own.items():
                layer.experts.get_parameter(name)[slot - first] = tensors[source.expert(index, own)]
    for name, parameter in ffn.parameters().items():
        layer.experts.get_parameter(name).requires_grad_(parameter.requires_grad)
    return layer


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
