"""Tasks: what a run learns. Each is one file that satisfies the protocol `Task`; the kind of data chooses it."""

from dynmoe_ds.config.schema import (
    GlueDataConfig,
    ImageFolderConfig,
    LlavaDataConfig,
    MegatronIndexedConfig,
    RunConfig,
    TextDataConfig,
    TokenShardsConfig,
)
from dynmoe_ds.training.tasks.classification import GlueFineTuning, ImageClassification
from dynmoe_ds.training.tasks.language_modeling import LanguageModeling
from dynmoe_ds.training.tasks.task import HeldOutTask, Task
from dynmoe_ds.training.tasks.vision_language import VisionLanguage


def build_task(config: RunConfig) -> Task:
    """The task that `config.data` calls for, with its data loaded.

    Collective: every rank. Raises: DataError, on every rank, for data that cannot be used, and ConfigError for a
    pretrained model that cannot take them.
    """
    match config.data:
        case TextDataConfig() | TokenShardsConfig() | MegatronIndexedConfig():
            return LanguageModeling(config)
        case GlueDataConfig():
            return GlueFineTuning(config)
        case ImageFolderConfig():
            return ImageClassification(config)
        case LlavaDataConfig():
            return VisionLanguage(config)


__all__ = [
    "GlueFineTuning",
    "HeldOutTask",
    "ImageClassification",
    "LanguageModeling",
    "Task",
    "VisionLanguage",
    "build_task",
]
