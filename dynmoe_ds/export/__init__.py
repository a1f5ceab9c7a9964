"""Trained models on disk."""

from dynmoe_ds.export.model import load_model, save_model

__all__ = ["load_model", "save_model"]
