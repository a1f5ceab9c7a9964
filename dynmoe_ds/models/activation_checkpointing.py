"""Recomputing the layers of a Hugging Face model in the backward pass instead of keeping their activations."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dynmoe_ds.config.schema import ParallelConfig
from dynmoe_ds.engine.activation_checkpointing import non_reentrant_checkpoint


def checkpoint_activations(model: PreTrainedModel, parallel: ParallelConfig) -> None:
    """Checkpoint every layer of the model as `parallel.activation_checkpointing` says.

    DeepSpeed's form fails at ZeRO-3, where its recomputation finds parameters that are not gathered (DeepSpeed 0.19.8,
    its issue 4595); `config.validate` refuses that pair.
    """
    kind = parallel.activation_checkpointing
    if kind == "none":
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    if kind == "deepspeed":
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer._gradient_checkpointing_func = non_reentrant_checkpoint
