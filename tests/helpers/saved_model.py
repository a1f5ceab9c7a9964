"""What the model that a run saved says, to be compared with what the run logged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import yaml

import dynmoe_ds as dm
from dynmoe_ds.config.build import build
from dynmoe_ds.data import load_text_data
from dynmoe_ds.training.evaluation import held_out_loss, held_out_order


class _Engine(SimpleNamespace):
    """A model alone, as evaluation wants its engine."""

    def __call__(self, **batch: object) -> object:
        return self.module(**batch)


def saved_model_loss(run_dir: Path) -> float:
    """The held-out loss of `run_dir/model`, on the run's own text, in this process alone."""
    config = build(yaml.safe_load((run_dir / "config.yaml").read_text()))
    model = dm.load_model(run_dir / "model")
    held_out = load_text_data(config.data).held_out
    engine = _Engine(module=model, device=model.device, train=model.train, eval=model.eval)
    return held_out_loss(engine, held_out, held_out_order(config.training, len(held_out)))
