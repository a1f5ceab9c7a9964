"""Hugging Face encoders with a classifier, pretrained or random, some of whose FFNs become MoELayers of copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from dynmoe_ds.config.schema import BertClassifierConfig, RunConfig, ViTClassifierConfig
from dynmoe_ds.distributed import attempt_together
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.models.activation_checkpointing import checkpoint_activations
from dynmoe_ds.models.pretrained import pretrained_config, pretrained_model
from dynmoe_ds.models.random_weights import seeded_weights
from dynmoe_ds.moe import upcycle

C = TypeVar("C", bound=PreTrainedConfig)

PRETRAINED = "model.pretrained"
# What fine-tuning starts anew.
HEAD = "classifier."


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What the classifier gives: one output per label, or, without labels, one number that is a regression's."""

    labels: Sequence[str]

    def apply_to(self, config: PreTrainedConfig) -> None:
        """Write it into a Hugging Face configuration."""
        config.num_labels = max(len(self.labels), 1)
        config.problem_type = "single_label_classification" if self.labels else "regression"
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: index for index, label in enumerate(self.labels)}


def bert_backbone(model: BertClassifierConfig, head: Head, *, vocab_size: int, max_length: int) -> BertConfig:
    """Hugging Face's configuration of the encoder that `model` describes, for input of that vocabulary and length.

    Collective: every rank. Raises: ConfigError, on every rank, for a pretrained folder that cannot be read, is no BERT,
    or is too small for the input.
    """
    if model.sizes is not None:
        config = BertConfig(
            vocab_size=vocab_size,
            max_position_embeddings=max_length,
            hidden_size=model.sizes.hidden_size,
            num_hidden_layers=model.sizes.num_layers,
            num_attention_heads=model.sizes.num_heads,
            intermediate_size=model.sizes.ffn_hidden_size,
        )
    else:
        config = attempt_together(lambda: pretrained_config(PRETRAINED, model.pretrained, ["bert"]))
        faults = []
        if vocab_size > config.vocab_size:
            faults.append(
                f"data.tokenizer has {vocab_size} tokens but the model in {model.pretrained} has {config.vocab_size}. "
                "Use the tokenizer of that folder."
            )
        if max_length > config.max_position_embeddings:
            faults.append(
                f"data.sequence_length is {max_length} but the model in {model.pretrained} takes at most "
                f"{config.max_position_embeddings} tokens. Use {config.max_position_embeddings} or fewer."
            )
        if faults:
            raise ConfigError(faults)
    return _finished(config, head, model.dropout)


def vit_backbone(model: ViTClassifierConfig, head: Head, *, image_size: int) -> ViTConfig:
    """Hugging Face's configuration of the encoder that `model` describes, for images of that size.

    Collective: every rank. Raises: ConfigError, on every rank, for a pretrained folder that cannot be read, is no ViT,
    or is for images of another size.
    """
    if model.sizes is not None:
        config = ViTConfig(
            image_size=image_size,
            patch_size=model.sizes.patch_size,
            hidden_size=model.sizes.hidden_size,
            num_hidden_layers=model.sizes.num_layers,
            num_attention_heads=model.sizes.num_heads,
            intermediate_size=model.sizes.ffn_hidden_size,
        )
    else:
        config = attempt_together(lambda: pretrained_config(PRETRAINED, model.pretrained, ["vit"]))
        if config.image_size != image_size:
            raise ConfigError(
                f"data.image_size is {image_size} but the model in {model.pretrained} is for images of "
                f"{config.image_size}. Use data.image_size={config.image_size}."
            )
    return _finished(config, head, model.dropout)


def build_classifier(config: RunConfig, backbone: BertConfig | ViTConfig) -> PreTrainedModel:
    """The float32 model on the CPU, with the FFNs of `config.model.moe_layers` upcycled.

    Weights depend on the pretrained ones and on `config.seed` alone: they are the same on every rank and for every
    layout, except that a rank holds only its own slots' experts. The global random state is left as it was.

    Collective: every rank. Raises: ConfigError, on every rank, for weights that cannot be loaded or belong to another
    model, layers that do not exist, or sizes that cannot work.
    """
    sizes = config.model
    assert isinstance(sizes, BertClassifierConfig | ViTClassifierConfig), type(sizes).__name__
    kind = BertForSequenceClassification if isinstance(backbone, BertConfig) else ViTForImageClassification

    def build() -> PreTrainedModel:
        with seeded_weights(config.seed):
            if sizes.pretrained is None:
                model = kind(backbone)
            else:
                model = pretrained_model(PRETRAINED, kind, sizes.pretrained, backbone, new_parts=(HEAD,))
        return upcycle(
            model,
            layers=sizes.moe_layers,
            num_experts=sizes.num_experts,
            num_slots=sizes.num_slots,
            router=config.router,
            ep_size=config.parallel.ep_size,
            seed=config.seed,
        )

    model = attempt_together(build)
    checkpoint_activations(model, config.parallel)
    return model


def _finished(config: C, head: Head, dropout: float) -> C:
    head.apply_to(config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return config
