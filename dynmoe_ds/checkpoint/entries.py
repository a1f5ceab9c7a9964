"""Under which names the tensors of a model stand in a weights file: experts by id, whatever slot they are in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dynmoe_ds.moe import MoELayer, Placement, moe_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One parameter or buffer of a model, and where it goes.

    slots: the slot of each row by its name in the file; None for a tensor that stands there whole, under `key`.
    layer: the layer whose expert-parallel ranks each hold a part of the rows; None where every rank holds all.
    """

    key: str
    tensor: Tensor
    slots: Mapping[str, int] | None = None
    layer: MoELayer | None = None

    def names(self) -> tuple[str, ...]:
        """The names in the file."""
        return (self.key,) if self.slots is None else tuple(self.slots)


PLACEMENT_BUFFERS = ("active", "expert_ids", "next_expert_id")
"""The buffers of a `MoELayer` that say which slot holds which expert."""


def entries(model: nn.Module, placements: Mapping[str, Placement] | None = None) -> list[Entry]:
    """Every tensor of a model's state dict once, except placements and second names of tied parameters.

    placements: by layer, by default the layers' own. Free slots are in no entry. Row 5 of `a.experts.w1` is
    `a.experts.5.w1` where slot 5 holds expert 5.
    """
    layers = moe_layers(model)
    seen: set[int] = set()
    found = []
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            owner = next((name for name in layers if key.startswith(_prefix(name))), None)
            entry: Entry | None = Entry(key=key, tensor=tensor)
            if owner is not None:
                placement = placements[owner] if placements is not None else layers[owner].placement
                entry = _of_layer(owner, layers[owner], placement, key, tensor)
            found += [entry] if entry is not None else []
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, each with the name under which the parameter is saved."""
    first: dict[int, str] = {}
    return {
        name: first[id(param)]
        for name, param in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(param), name) != name
    }


def _of_layer(name: str, layer: MoELayer, placement: Placement, key: str, tensor: Tensor) -> Entry | None:
    """The entry of a layer's tensor; None for its placement, which the manifest holds."""
    part, _, own = key.removeprefix(_prefix(name)).partition(".")
    slots = {f"{_prefix(name)}{part}.{expert_id}.{own}": slot for expert_id, slot in placement.slots_by_id.items()}
    if part == "experts":
        return Entry(key=key, tensor=tensor, slots=slots, layer=layer)
    if part in PLACEMENT_BUFFERS:
        return None
    if part == "router" and (own in layer.router.slot_parameters() or own in layer.router.slot_buffers):
        return Entry(key=key, tensor=tensor, slots=slots)
    return Entry(key=key, tensor=tensor)


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
