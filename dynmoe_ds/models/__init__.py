"""Hugging Face backbones with MoELayers in the place of some of their MLPs."""

from dynmoe_ds.models.classifier import Head, bert_backbone, build_classifier, vit_backbone
from dynmoe_ds.models.decoder import build_decoder, decoder_backbone, dense_decoder, shared_expert
from dynmoe_ds.models.flops import FlopCount, count_flops
from dynmoe_ds.models.parameters import ParameterCount, count_parameters, parameter_groups

__all__ = [
    "FlopCount",
    "Head",
    "ParameterCount",
    "bert_backbone",
    "build_classifier",
    "build_decoder",
    "count_flops",
    "count_parameters",
    "decoder_backbone",
    "dense_decoder",
    "parameter_groups",
    "shared_expert",
    "vit_backbone",
]
