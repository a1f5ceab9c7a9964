"""What a finished run left, in one process and without a launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynmoe_ds.config.build import build
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.errors import DataError
from dynmoe_ds.export import load_model
from dynmoe_ds.models import count_flops, count_parameters
from dynmoe_ds.moe import MoELayer, PaddingMask, StepLedger, labelled
from dynmoe_ds.telemetry import Metric
from dynmoe_ds.training.expert_loads import ExpertLoads
from dynmoe_ds.training.observation import cost_metrics, kind_metrics
from dynmoe_ds.training.tasks import build_task

CONFIG_FILE, MODEL_FOLDER = "config.yaml", "model"


class SavedRun:
    """The configuration and the model of a run folder, on this machine's accelerator if it has one.

    Raises: DataError if the folder is not that of a run that has come to its end with a model; CheckpointError for a
    model that cannot be loaded.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        for name in (CONFIG_FILE, MODEL_FOLDER):
            if not (self.folder / name).exists():
                raise DataError(
                    f"{folder} has no {name} (seen from {Path.cwd()}). Name the folder of a run that has come to its "
                    "end with training.save_model=true."
                )
        self.config: RunConfig = build(yaml.safe_load((self.folder / CONFIG_FILE).read_text(encoding="utf-8")))
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.model: PreTrainedModel = load_model(self.folder / MODEL_FOLDER).to(device or "cpu")
        self.layers = {name: module for name, module in self.model.named_modules() if isinstance(module, MoELayer)}
        padding = PaddingMask()
        padding.watch(self.model)
        for name, layer in self.layers.items():
            layer.name, layer.padding = name, padding

    def evaluate(self) -> list[Metric]:
        """What the run's task measures on its held-out data, with mean k and active parameters beside it.

        Raises: DataError for data that is not there any more.
        """
        task = build_task(self.config)
        with StepLedger(evaluation=True, num_kinds=len(task.token_kinds)) as ledger:
            values = task.evaluate(_Alone(self.model))
        placements = {name: layer.placement for name, layer in self.layers.items()}
        loads = ExpertLoads()
        loads.add(ledger.records(), placements)
        return [
            *(Metric(name=name, value=value, reduction="last") for name, value in values.items()),
            *loads.metrics("eval"),
            *kind_metrics("eval", loads, task.token_kinds),
            *cost_metrics(
                "eval",
                loads,
                placements,
                count_parameters(self.model, ep_size=1),
                count_flops(self.model, task.tokens_per_example),
            ),
        ]


class _Alone:
    """A model where an engine is expected."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def __call__(self, *, token_kinds: Tensor | None = None, **batch: Any) -> Any:
        with labelled(kinds=token_kinds):
            return self.module(**batch)

    def train(self) -> nn.Module:
        return self.module.train()

    def eval(self) -> nn.Module:
        return self.module.eval()
