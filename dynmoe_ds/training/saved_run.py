"""What a finished run left, in one process and without a launcher."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from dynmoe_ds.config.build import build
from dynmoe_ds.config.schema import GlueDataConfig, ImageFolderConfig, RunConfig
from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.export import load_model
from dynmoe_ds.models import count_flops, count_parameters, see_images_in_vain
from dynmoe_ds.moe import MoELayer, PaddingMask, StepLedger, labelled
from dynmoe_ds.telemetry import Metric
from dynmoe_ds.training.expert_loads import ExpertLoads
from dynmoe_ds.training.observation import cost_metrics, kind_metrics
from dynmoe_ds.training.tasks import Task, build_task

CONFIG_FILE, MODEL_FOLDER = "config.yaml", "model"


class SavedRun:
    """The configuration and the model of a run folder, on this machine's accelerator if it has one.

    Raises: DataError if the folder is not that of a run that has come to its end with a model; ConfigError for a run
    of a task whose model cannot be built again; CheckpointError for a model that cannot be loaded.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        for name in (CONFIG_FILE, MODEL_FOLDER):
            if not (self.folder / name).exists():
                raise DataError(
                    f"{folder} has no {name} (seen from {Path.cwd()}). Name the folder of a run that has come to its "
                    "end with training.save_model=true."
                )
        self.config = _read_config(self.folder / CONFIG_FILE)
        if isinstance(self.config.data, GlueDataConfig | ImageFolderConfig):
            raise ConfigError(
                f"{folder} is of a run with data.name {self.config.data.name}. Only models of text and vision-language "
                "models are built again from a run folder; its metrics.jsonl has what was evaluated."
            )
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.model: PreTrainedModel = load_model(self.folder / MODEL_FOLDER).to(device or "cpu")
        self.layers = {name: module for name, module in self.model.named_modules() if isinstance(module, MoELayer)}
        if isinstance(self.model, LlavaForConditionalGeneration):
            see_images_in_vain(self.model)  # as in training: held-out batches of text alone bring one
        padding = PaddingMask()
        padding.watch(self.model)
        for name, layer in self.layers.items():
            layer.name, layer.padding = name, padding

    @cached_property
    def task(self) -> Task:
        """The run's task. Raises: DataError for data that are not there any more."""
        return build_task(self.config)

    def evaluate(self) -> list[Metric]:
        """What the run's task measures on its held-out data, with mean k and active parameters beside it.

        Raises: DataError for data that is not there any more.
        """
        task = self.task
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


def _read_config(file: Path) -> RunConfig:
    """Raises: DataError for a file that is no configuration of a run."""
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    if not isinstance(plain, dict):
        raise DataError(f"{file} holds no configuration. Copy the run folder again.")
    return build(plain)


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
