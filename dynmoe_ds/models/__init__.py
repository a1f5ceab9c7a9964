"""Hugging Face backbones with MoELayers in the place of some of their MLPs."""

from dynmoe_ds.models.decoder import build_decoder
from dynmoe_ds.models.parameters import ParameterCount, count_parameters, parameter_groups

__all__ = ["ParameterCount", "build_decoder", "count_parameters", "parameter_groups"]
