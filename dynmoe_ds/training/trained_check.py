"""Which parameters train, looked at once everything that decides about it is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import LlavaForConditionalGeneration

from dynmoe_ds.models import trained_parameters

_SHOWN = 5


def check_trained(model: nn.Module, groups: Sequence[Sequence[str]], parts: Sequence[str] | None) -> None:
    """Whether gradients are wanted for, and the optimiser holds, the same parameters, and just those of a stage.

    groups: names of the parameters in each of the optimiser's groups. parts: what the stage trains
    (`StageConfig.trained`); None for a run without stages.
    """
    requiring = {name for name, param in model.named_parameters() if param.requires_grad}
    held = [name for group in groups for name in group]
    assert len(held) == len(set(held)), f"twice in the optimiser: {_listed(n for n in held if held.count(n) > 1)}"
    assert requiring == set(held), (
        f"with a gradient but not in the optimiser: {_listed(requiring - set(held))}; "
        f"in the optimiser but without one: {_listed(set(held) - requiring)}"
    )
    if parts is not None:
        assert isinstance(model, LlavaForConditionalGeneration), type(model).__name__
        wanted = trained_parameters(model, parts)
        assert requiring == wanted, (
            f"the stage trains {', '.join(parts)}; of these frozen: {_listed(wanted - requiring)}; trained but not of "
            f"these: {_listed(requiring - wanted)}"
        )


def _listed(names: Iterable[str]) -> str:
    """The first few."""
    found = sorted(set(names))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (", ".join(found[:_SHOWN]) or "nothing") + more
