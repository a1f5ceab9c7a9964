"""Hugging Face backbones with MoELayers in the place of some of their MLPs."""

from dynmoe_ds.models.classifier import Head, bert_backbone, build_classifier, vit_backbone
from dynmoe_ds.models.decoder import build_decoder, decoder_backbone
from dynmoe_ds.models.dense import dense_model, empty_model
from dynmoe_ds.models.flops import FlopCount, count_flops
from dynmoe_ds.models.fused_norms import fuse_norms
from dynmoe_ds.models.parameters import ParameterCount, count_parameters, parameter_groups
from dynmoe_ds.models.shared_experts import GatedSharedExpert, shared_expert, shared_ffn_hidden_size
from dynmoe_ds.models.vision_language import (
    PACKABLE,
    Vocabulary,
    build_vision_language,
    check_packing,
    finish_vision_language,
    llava_backbone,
    pretrained_decoder,
    pretrained_tower,
    take_conversations,
    tokens_per_image,
    trained_parameters,
)

__all__ = [
    "PACKABLE",
    "FlopCount",
    "GatedSharedExpert",
    "Head",
    "ParameterCount",
    "Vocabulary",
    "bert_backbone",
    "build_classifier",
    "build_decoder",
    "build_vision_language",
    "check_packing",
    "count_flops",
    "count_parameters",
    "decoder_backbone",
    "dense_model",
    "empty_model",
    "finish_vision_language",
    "fuse_norms",
    "llava_backbone",
    "parameter_groups",
    "pretrained_decoder",
    "pretrained_tower",
    "shared_expert",
    "shared_ffn_hidden_size",
    "take_conversations",
    "tokens_per_image",
    "trained_parameters",
    "vit_backbone",
]
