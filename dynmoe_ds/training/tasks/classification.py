"""Fine-tuning an upcycled encoder to label sentences (GLUE) or images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, ViTConfig

from dynmoe_ds.config.schema import (
    BertClassifierConfig,
    GlueDataConfig,
    ImageFolderConfig,
    RunConfig,
    ViTClassifierConfig,
)
from dynmoe_ds.data import Examples, GlueData, ImageFolderData, load_glue_data, load_image_folder
from dynmoe_ds.models import Head, bert_backbone, build_classifier, vit_backbone
from dynmoe_ds.training.engine import TrainingEngine
from dynmoe_ds.training.evaluation import held_out_order
from dynmoe_ds.training.metrics import METRIC_FUNCTIONS
from dynmoe_ds.training.predictions import Predictions, predict

TOKENIZER_FOLDER = "tokenizer"
CLASSES_FILE = "classes.txt"


def scores(predictions: Predictions, metrics: Sequence[str], is_regression: bool) -> dict[str, float]:
    """The named metrics of `training.metrics`, and `loss`: the mean cross entropy in nats, or squared error."""
    outputs, labels = predictions
    if is_regression:
        answers = outputs.squeeze(1)
        loss = F.mse_loss(answers, labels)
    else:
        answers = outputs.argmax(1)
        loss = F.cross_entropy(outputs, labels.long())
    return {"loss": float(loss), **{name: METRIC_FUNCTIONS[name](answers, labels) for name in metrics}}


class _Classification:
    """What both kinds share. backbone: the encoder that `build_model` puts experts into."""

    config: RunConfig
    data: GlueData | ImageFolderData
    backbone: BertConfig | ViTConfig

    @property
    def train(self) -> Examples:
        return self.data.train

    @property
    def grouping(self) -> None:
        return None

    @property
    def token_kinds(self) -> tuple[str, ...]:
        return ()

    @property
    def left_out(self) -> None:
        return None

    def build_model(self) -> nn.Module:
        return build_classifier(self.config, self.backbone)

    def sample(self, engine: TrainingEngine) -> str | None:
        return None


class GlueFineTuning(_Classification):
    """One task of GLUE. It reports `eval/loss`, GLUE's own metrics, and their mean as `eval/score`.

    MNLI's mismatched half has metrics of its own, `eval/accuracy_mismatched`, and is not in the score.
    Collective: construction, which loads the data. Raises: DataError or ConfigError, on every rank, for data that
    cannot be used, or that the pretrained model cannot take.
    """

    data: GlueData

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.data, GlueDataConfig), type(config.data).__name__
        assert isinstance(config.model, BertClassifierConfig), type(config.model).__name__
        self.config = config
        self.data = load_glue_data(config.data)
        self.backbone = bert_backbone(
            config.model,
            Head(labels=self.data.task.classes),
            vocab_size=len(self.data.tokenizer),
            max_length=config.data.sequence_length,
        )
        self._tokens_per_example = self.data.train.mean_length()

    @property
    def num_held_out(self) -> int:
        """Of the larger file, where there are two."""
        return max(len(examples) for examples in self.data.held_out.values())

    @property
    def tokens_per_example(self) -> int:
        """The mean, without padding."""
        return self._tokens_per_example

    def evaluate(self, engine: TrainingEngine) -> dict[str, float]:
        task = self.data.task
        values: dict[str, float] = {}
        for suffix, examples in self.data.held_out.items():
            order = held_out_order(self.config.training, len(examples))
            found = scores(predict(engine, examples, order), task.metrics, task.is_regression)
            values |= {f"eval/{name}{suffix}": value for name, value in found.items()}
        values["eval/score"] = sum(values[f"eval/{name}"] for name in task.metrics) / len(task.metrics)
        return values

    def write_files(self, folder: Path) -> None:
        self.data.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)


class ImageClassification(_Classification):
    """Images with classes. It reports `eval/loss` and `eval/accuracy`, the share of right first answers.

    Collective: construction, which lists the images. Raises: DataError or ConfigError, on every rank, for folders that
    cannot be used, or images that the pretrained model cannot take.
    """

    data: ImageFolderData
    backbone: ViTConfig

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.data, ImageFolderConfig), type(config.data).__name__
        assert isinstance(config.model, ViTClassifierConfig), type(config.model).__name__
        self.config = config
        self.data = load_image_folder(config.data, config.seed)
        self.backbone = vit_backbone(config.model, Head(labels=self.data.classes), image_size=config.data.image_size)

    @property
    def num_held_out(self) -> int:
        return len(self.data.held_out)

    @property
    def tokens_per_example(self) -> int:
        """The patches and the classifier's token."""
        return (self.backbone.image_size // self.backbone.patch_size) ** 2 + 1

    def evaluate(self, engine: TrainingEngine) -> dict[str, float]:
        order = held_out_order(self.config.training, self.num_held_out)
        found: Mapping[str, float] = scores(predict(engine, self.data.held_out, order), ("accuracy",), False)
        return {f"eval/{name}": value for name, value in found.items()}

    def write_files(self, folder: Path) -> None:
        """The names of the classes, one a line, in the order of the model's outputs."""
        (folder / CLASSES_FILE).write_text("".join(f"{name}\n" for name in self.data.classes), encoding="utf-8")
