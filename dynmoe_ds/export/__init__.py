"""Trained models on disk, and models of others as models with `MoELayer`s."""

from dynmoe_ds.export.checkpoint_model import load_checkpoint_model
from dynmoe_ds.export.dynmoe_import import import_dynmoe_checkpoint
from dynmoe_ds.export.hugging_face import export_hugging_face, load_hugging_face, moe_class, register_auto_classes
from dynmoe_ds.export.model import load_model, save_model
from dynmoe_ds.export.published import import_published_model
from dynmoe_ds.export.top_k_import import import_top_k_model

__all__ = [
    "export_hugging_face",
    "import_dynmoe_checkpoint",
    "import_published_model",
    "import_top_k_model",
    "load_checkpoint_model",
    "load_hugging_face",
    "load_model",
    "moe_class",
    "register_auto_classes",
    "save_model",
]
