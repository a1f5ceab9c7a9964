"""What a run left, or has written so far, in one process and without a launcher."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from dynmoe_ds.checkpoint.store import find_checkpoint, list_checkpoints, open_checkpoint
from dynmoe_ds.config.build import build
from dynmoe_ds.config.schema import GlueDataConfig, ImageFolderConfig, RunConfig
from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.export import load_checkpoint_model, load_hugging_face, load_model
from dynmoe_ds.export.hugging_face import HUGGING_FACE_FILE
from dynmoe_ds.export.manifest import MANIFEST_FILE, read_manifest
from dynmoe_ds.models import count_flops, count_parameters, take_conversations
from dynmoe_ds.moe import StepLedger, labelled, moe_layers, watch_padding
from dynmoe_ds.telemetry import Metric
from dynmoe_ds.telemetry.run_folder import CHECKPOINT_FOLDER, CONFIG_FILE, MODEL_FILE
from dynmoe_ds.training.expert_loads import ExpertLoads
from dynmoe_ds.training.observation import cost_metrics, kind_metrics
from dynmoe_ds.training.tasks import HeldOutTask, Task, build_task
from dynmoe_ds.training.tasks.vision_language import TOKENIZER_FOLDER

MODEL_FOLDER = "model"


class SavedRun:
    """The configuration and the model of a run, on this machine's accelerator if it has one.

    path: a run folder, whose model is that of its end (`model`) or else of its latest checkpoint; or a checkpoint of a
    run, or its folder of checkpoints, for the latest; or a folder of `dynmoe import` or `dynmoe export`, which have a
    model and no configuration of a run. source: where the model is from. folder: the run's. tokenizer_folder: where the
    tokenizer is, if there is one.
    Raises: DataError if there is neither a model nor a checkpoint of a run; ConfigError for a run of a task whose model
    cannot be built again; CheckpointError for a model or a checkpoint that cannot be loaded.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder, self.source = _find(Path(path))
        self.tokenizer_folder = self.folder if is_hugging_face(self.folder) else self.folder / TOKENIZER_FOLDER
        has_config = (self.folder / CONFIG_FILE).exists()
        self._config = _read_config(self.folder / CONFIG_FILE) if has_config else None
        if self._config is not None and isinstance(self._config.data, GlueDataConfig | ImageFolderConfig):
            raise ConfigError(
                f"{self.folder} is of a run with data.name {self._config.data.name}. Only models of text and "
                "vision-language models are built again from a run folder; its metrics.jsonl has what was evaluated."
            )
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.model: PreTrainedModel = self._load().to(device or "cpu")
        self.layers = moe_layers(self.model)
        if isinstance(self.model, LlavaForConditionalGeneration):
            take_conversations(self.model)  # as in training: held-out batches of text alone bring one
        watch_padding(self.model)
        for name, layer in self.layers.items():
            layer.name = name

    def _load(self) -> PreTrainedModel:
        if is_hugging_face(self.source):
            return load_hugging_face(self.source)
        if self.source.name == MODEL_FOLDER:
            return load_model(self.source)
        description = self.folder / MODEL_FILE
        if not description.exists():
            raise DataError(
                f"{self.folder} has no {MODEL_FILE}, which says what model {self.source.name} is a checkpoint of: the "
                "run was begun by an older dynmoe_ds. Let it go on with this one, which writes the file as it begins."
            )
        dtype: torch.dtype = getattr(torch, self.config.parallel.dtype)
        return load_checkpoint_model(open_checkpoint(self.source), read_manifest(description), description, dtype)

    @property
    def config(self) -> RunConfig:
        """The run's. Raises: DataError for an imported or exported model, which is of no run here."""
        if self._config is None:
            sees = isinstance(self.model, LlavaForConditionalGeneration)
            others = "conversations to evaluate on with --held-out, or " if sees else ""
            raise DataError(
                f"{self.folder} holds a model without its run, and so without data. Give {others}benchmarks with "
                "--tasks; or name the run."
            )
        return self._config

    @cached_property
    def task(self) -> Task:
        """The run's task. Raises: DataError for data that are not there any more, and as `config`."""
        return build_task(self.config)

    def evaluate(self, task: HeldOutTask | None = None) -> list[Metric]:
        """What `task`, or else the run's, measures on its held-out data, with mean k and active parameters beside it.

        Raises: DataError for data that is not there any more.
        """
        task = self.task if task is None else task
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


def is_imported(folder: Path) -> bool:
    """Whether `dynmoe import` wrote the folder: it holds a model and is of no run."""
    return not (folder / CONFIG_FILE).exists() and (folder / MODEL_FOLDER / MANIFEST_FILE).exists()


def is_hugging_face(folder: Path) -> bool:
    """Whether the folder is of Hugging Face's format, as `dynmoe export` writes it, and of no run."""
    return not (folder / CONFIG_FILE).exists() and (folder / HUGGING_FACE_FILE).exists()


def _find(path: Path) -> tuple[Path, Path]:
    """The run folder, and the model or the checkpoint in it.

    Raises: DataError if there is none; CheckpointError for a checkpoint that is not there.
    """
    folder, absolute = path, path.absolute()
    if not (path / CONFIG_FILE).exists():
        is_checkpoint, is_folder_of_them = (it.name == CHECKPOINT_FOLDER for it in (absolute.parent, absolute))
        folder = absolute.parents[1] if is_checkpoint else absolute.parent if is_folder_of_them else path
    if not (folder / CONFIG_FILE).exists():
        if is_imported(path):
            return path, path / MODEL_FOLDER
        if is_hugging_face(path):
            return path, path
        raise DataError(
            f"{folder} has no {CONFIG_FILE} (seen from {Path.cwd()}). Name the folder of a run, a checkpoint in its "
            f"folder {CHECKPOINT_FOLDER}, or a folder of `dynmoe export` or `dynmoe import`."
        )
    if folder is not path:
        return folder, find_checkpoint(path)
    if (folder / MODEL_FOLDER).exists():
        return folder, folder / MODEL_FOLDER
    if not list_checkpoints(folder / CHECKPOINT_FOLDER):
        raise DataError(
            f"{folder} has no {MODEL_FOLDER} (seen from {Path.cwd()}) and no checkpoint. Name the folder of a run that "
            "has come to its end with training.save_model=true, or has written a checkpoint (checkpoint.every_steps)."
        )
    return folder, find_checkpoint(folder / CHECKPOINT_FOLDER)


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
