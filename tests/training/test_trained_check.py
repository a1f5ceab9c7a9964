"""What trains is what the optimiser holds and the stage names; anything else stops the run before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.spawn import run_ranks
from tests.helpers.vision_language import tiny_run, write_digits
from torch import nn

from dynmoe_ds.training import Trainer, trainer
from dynmoe_ds.training.tasks import VisionLanguage
from dynmoe_ds.training.trained_check import check_trained

DENSE, ROUTER = "model.language_model.layers.1.mlp.up_proj.weight", "model.language_model.layers.0.mlp.router.weight"
# The group without weight decay, which is the last.
THRESHOLDS = [f"model.language_model.layers.{layer}.mlp.router.threshold" for layer in (0, 2)]


class _Wrong(VisionLanguage):
    """A dense FFN trains though the stage trains experts alone, and a router does not."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.get_parameter(DENSE).requires_grad_(True)
        model.get_parameter(ROUTER).requires_grad_(False)
        return model


def start(rank: int, world_size: int, digits: str, folder: str) -> list[str]:
    """What is said of a model that is `_Wrong`, and where the optimiser is not given the last of its groups."""
    said = []

    def refused(run: str) -> None:
        with pytest.raises(AssertionError) as caught:
            Trainer(tiny_run(Path(digits), Path(folder) / run, "experts"))
        said.append(str(caught.value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_task", _Wrong)
        refused("wrong")
    ordinary = trainer.parameter_groups
    trainer.parameter_groups = lambda *arguments: ordinary(*arguments)[:-1]
    refused("without a group")
    return said


def test_a_run_that_would_train_something_else_than_its_stage_does_not_start(tmp_path: Path) -> None:
    digits = write_digits(tmp_path / "digits")
    [(of_stage, of_optimiser)] = run_ranks(start, 1, f"{digits}", f"{tmp_path}")
    wanted = f"the stage trains experts; of these frozen: {ROUTER}; trained but not of these: {DENSE}"
    assert of_stage.startswith(wanted), of_stage
    wanted = (
        f"with a gradient but not in the optimiser: {', '.join(THRESHOLDS)}; in the optimiser but without one: nothing"
    )
    assert of_optimiser == wanted, of_optimiser


def test_what_the_optimiser_holds_is_what_wants_gradients() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abcdefg"})
    names = [f"{name}.weight" for name in model]
    check_trained(model, [names[:3], names[3:]], None)
    with pytest.raises(AssertionError, match=r"with a gradient but not in the optimiser: g\.weight; .* one: nothing"):
        check_trained(model, [names[:-1]], None)
    model.requires_grad_(False)
    wanted = r"optimiser: nothing; in the optimiser but without one: a\.weight, b.*, e\.weight and 2 more"
    with pytest.raises(AssertionError, match=wanted):
        check_trained(model, [names], None)
    with pytest.raises(AssertionError, match=r"twice in the optimiser: a\.weight$"):
        check_trained(model, [names, names[:1]], None)
