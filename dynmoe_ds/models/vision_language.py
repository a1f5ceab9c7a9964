"""Vision-language models: transformers' Llava, the FFNs of whose language model may become MoELayers of copies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dynmoe_ds.config.schema import LlavaModelConfig, RunConfig
from dynmoe_ds.distributed import attempt_together
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.models.activation_checkpointing import checkpoint_activations
from dynmoe_ds.models.dense import dense_model
from dynmoe_ds.models.pretrained import pretrained_config, pretrained_model
from dynmoe_ds.models.random_weights import seeded_weights
from dynmoe_ds.models.rotary import keep_frequencies_exact
from dynmoe_ds.moe import MoELayer, upcycle
from dynmoe_ds.routing import RouterConfig, TopAnyConfig

VISION, TEXT = "model.vision_pretrained", "model.text_pretrained"
# The features before the tower's last layer, as in LLaVA.
FEATURE_LAYER = -2

_TOWERS: dict[str, Any] = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
# Decoders that keep packed samples apart, as the tests say of each: the mask they make of positions that begin again is
# right, and no other part of them knows of places in the row.
PACKABLE = ("gemma", "llama", "mistral", "phi", "qwen2", "stablelm")
# Kernels that take that mask. Flash attention tells samples apart in batches of one row only.
_MASKED_ATTENTION = ("eager", "sdpa")
# What a folder of a whole CLIP or SigLIP says of itself; its vision tower is a part of it.
_PAIRS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What the language model must know of the tokenizer. size: of the tokenizer, with `image_token_id`."""

    size: int
    image_token_id: int
    pad_token_id: int
    end_token_id: int


def llava_backbone(model: LlavaModelConfig, vocabulary: Vocabulary, *, image_size: int, max_length: int) -> LlavaConfig:
    """Hugging Face's configuration of the model that `model` describes, for such images and texts.

    Collective: every rank. Raises: ConfigError, on every rank, for pretrained folders that cannot be read, hold other
    models, or are for other images or shorter texts.
    """
    return attempt_together(lambda: _backbone(model, vocabulary, image_size, max_length))


def pretrained_tower(folder: str, image_size: int) -> CLIPVisionConfig | SiglipVisionConfig:
    """The configuration of the vision tower in `folder`, or of that of the whole CLIP or SigLIP there.

    Raises: ConfigError for a folder that cannot be read, holds another model, or is for images of another size.
    """
    found = pretrained_config(VISION, folder, [*_TOWERS, *_PAIRS])
    vision = found.vision_config if found.model_type in _PAIRS else found
    assert isinstance(vision, CLIPVisionConfig | SiglipVisionConfig), type(vision)
    if vision.image_size != image_size:
        raise ConfigError(
            f"data.image_size is {image_size} but the tower in {folder} is for images of {vision.image_size}. Use "
            f"data.image_size={vision.image_size}."
        )
    return vision


def pretrained_decoder(folder: str, max_length: int) -> PreTrainedConfig:
    """The configuration of the decoder in `folder`.

    Raises: ConfigError for a folder that cannot be read, holds another kind of model, or takes shorter texts only.
    """
    found = pretrained_config(TEXT, folder)
    if type(found) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"{TEXT} is {folder!r}, which holds a model of type {found.model_type} where a decoder that writes text is "
            "needed."
        )
    if (longest := getattr(found, "max_position_embeddings", max_length)) < max_length:
        raise ConfigError(
            f"data.sequence_length is {max_length} but the model in {folder} takes at most {longest} tokens. Use "
            f"{longest} or fewer."
        )
    return found


def tokens_per_image(config: LlavaConfig) -> int:
    """The features of one image, which take the places of as many tokens: a CLIP tower's first one is left out."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def build_vision_language(config: RunConfig, backbone: LlavaConfig) -> LlavaForConditionalGeneration:
    """The float32 model on the CPU, without experts.

    Weights depend on the pretrained ones and on `config.seed` alone: they are the same on every rank. The global random
    state is left as it was.
    Collective: every rank. Raises: ConfigError, on every rank, for weights that cannot be loaded.
    """
    sizes = config.model
    assert isinstance(sizes, LlavaModelConfig), type(sizes).__name__

    def build() -> LlavaForConditionalGeneration:
        model = dense_model(LlavaForConditionalGeneration, backbone, config.seed)
        if sizes.vision_pretrained is not None:
            kind = _TOWERS[backbone.vision_config.model_type]
            model.model.vision_tower = pretrained_model(VISION, kind, sizes.vision_pretrained, backbone.vision_config)
        if sizes.text_pretrained is not None:
            with seeded_weights(config.seed):  # of rows for new tokens
                _take_text_model(model, sizes.text_pretrained)
        return model

    return attempt_together(build)


def finish_vision_language(model: LlavaForConditionalGeneration, config: RunConfig) -> LlavaForConditionalGeneration:
    """`model` itself, ready for the stage: with experts if the stage has them, and all frozen but what it trains.

    Experts are made once, from the FFNs of the stage before; a model that has MoELayers already keeps them, and their
    temperatures unless `config.router` sets another than the default.
    Collective: every rank. Raises: ConfigError, on every rank, for layers or sizes that cannot work, a router or a kind
    of expert other than the model's, or a model with experts in a stage that has none.
    """
    sizes, stage = config.model, config.stage
    assert isinstance(sizes, LlavaModelConfig) and stage is not None, (type(sizes).__name__, stage)

    def finish() -> LlavaForConditionalGeneration:
        has_layers = any(isinstance(module, MoELayer) for module in model.modules())
        if has_layers and not stage.has_experts:
            raise ConfigError(
                f"stage.has_experts is false but the model in stage.start ({stage.start}) has experts. Start from a "
                "model without, or use a stage with experts."
            )
        if stage.has_experts and not has_layers:
            upcycle(
                model.model.language_model,
                layers=sizes.moe_layers,
                num_experts=sizes.num_experts,
                num_slots=sizes.num_slots,
                router=config.router,
                ep_size=config.parallel.ep_size,
                seed=config.seed,
            )
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        _check_routers(layers, config.router, stage.start)
        kinds = {layer.expert_kind for layer in layers}
        if kinds - {config.expert.kind}:
            raise ConfigError(
                f"expert.kind is {config.expert.kind} but the language model's FFNs are {', '.join(sorted(kinds))}. "
                f"Use expert={min(kinds)}."
            )
        return model

    attempt_together(finish)
    checkpoint_activations(model, config.parallel)
    take_conversations(model)
    freeze_all_but(model, stage.trained)
    return model


def _check_routers(layers: Sequence[MoELayer], wanted: RouterConfig, start: str | None) -> None:
    """Raises: ConfigError for routers other than `wanted`."""
    default, kept = TopAnyConfig().temperature, []
    for layer in layers:
        own, matching = layer.router.config, wanted
        # DynMoE's authors learn a temperature in every layer, so no section can name those of an imported model.
        if isinstance(own, TopAnyConfig) and isinstance(wanted, TopAnyConfig) and wanted.temperature == default:
            matching = replace(wanted, temperature=own.temperature)
            kept.append(own.temperature)
        if own != matching:
            raise ConfigError(
                f"stage.start is {start}, whose routers are {own}, but the section router says {wanted}. Use that "
                "router."
            )
    if any(temperature != default for temperature in kept) and (not dist.is_initialized() or dist.get_rank() == 0):
        told = ", ".join(f"{temperature:.4g}" for temperature in kept)
        logger.info("The routers keep the temperatures that they have in %s: %s", start, told)


def take_conversations(model: LlavaForConditionalGeneration) -> None:
    """Let `model` take the batches of `data.ConversationExamples` (`_TakesConversations`)."""
    model.model.__class__ = _TakesConversations


def check_packing(model: LlavaForConditionalGeneration) -> None:
    """Raises: ConfigError if samples in one row may see one another in the language model."""
    config = model.model.language_model.config
    if config.model_type not in PACKABLE:
        raise ConfigError(
            f"data.packing is true but the language model is of type {config.model_type}. Samples in one row are known "
            f"to stay apart in {', '.join(PACKABLE)}. Set data.packing=false."
        )
    if (attention := config._attn_implementation) not in _MASKED_ATTENTION:
        raise ConfigError(
            f"data.packing is true but the attention of the language model is {attention}, in which samples in one row "
            f"may see one another. Use {' or '.join(_MASKED_ATTENTION)}, or set data.packing=false."
        )


def freeze_all_but(model: LlavaForConditionalGeneration, trained: Sequence[str]) -> None:
    """Let the named parts (`StageConfig.trained`) require gradients and nothing else."""
    model.requires_grad_(False)
    for module in _trained_modules(model, trained):
        module.requires_grad_(True)


def _trained_modules(model: LlavaForConditionalGeneration, trained: Sequence[str]) -> list[nn.Module]:
    inner = model.model
    found: list[nn.Module] = []
    for part in trained:
        match part:
            case "vision_tower":
                found.append(inner.vision_tower)
            case "projector":
                found.append(inner.multi_modal_projector)
            case "language_model":
                found += [inner.language_model, model.lm_head]
            case "experts":
                layers = [module for module in inner.modules() if isinstance(module, MoELayer)]
                found += [part for layer in layers for part in (layer.router, layer.experts)]
    return found


def trained_parameters(model: LlavaForConditionalGeneration, trained: Sequence[str]) -> set[str]:
    """Names of the parameters of the named parts (`StageConfig.trained`), a tied one once."""
    wanted = {id(param) for module in _trained_modules(model, trained) for param in module.parameters()}
    return {name for name, param in model.named_parameters() if id(param) in wanted}


def _backbone(model: LlavaModelConfig, vocabulary: Vocabulary, image_size: int, max_length: int) -> LlavaConfig:
    vision, text = _vision(model, image_size), _text(model, vocabulary, max_length)
    text.vocab_size = max(text.vocab_size, vocabulary.size)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocabulary.image_token_id,
        image_seq_length=(image_size // vision.patch_size) ** 2,
        vision_feature_layer=FEATURE_LAYER,
        # SigLIP has no token of its own before the patches.
        vision_feature_select_strategy="default" if vision.model_type == "clip_vision_model" else "full",
        tie_word_embeddings=bool(text.tie_word_embeddings),
        pad_token_id=vocabulary.pad_token_id,
        eos_token_id=vocabulary.end_token_id,
    )


def _vision(model: LlavaModelConfig, image_size: int) -> PreTrainedConfig:
    if (sizes := model.vision_sizes) is not None:
        return CLIPVisionConfig(
            image_size=image_size,
            patch_size=sizes.patch_size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.ffn_hidden_size,
        )
    assert model.vision_pretrained is not None, "checked with the configuration"
    return pretrained_tower(model.vision_pretrained, image_size)


def _text(model: LlavaModelConfig, vocabulary: Vocabulary, max_length: int) -> PreTrainedConfig:
    if (sizes := model.text_sizes) is not None:
        return LlamaConfig(
            vocab_size=vocabulary.size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.ffn_hidden_size,
            max_position_embeddings=max_length,
            bos_token_id=None,
            eos_token_id=vocabulary.end_token_id,
            pad_token_id=vocabulary.pad_token_id,
        )
    assert model.text_pretrained is not None, "checked with the configuration"
    return pretrained_decoder(model.text_pretrained, max_length)


def _take_text_model(model: LlavaForConditionalGeneration, folder: str) -> None:
    """Put the folder's decoder into `model`, with rows for tokens that its tokenizer has got since."""
    wanted = model.config.text_config.vocab_size
    own = pretrained_config(TEXT, folder)
    decoder: Any = pretrained_model(TEXT, AutoModelForCausalLM, folder, own)
    if own.vocab_size < wanted:
        decoder.resize_token_embeddings(wanted)
    model.model.language_model = decoder.base_model
    model.lm_head = decoder.get_output_embeddings()
    keep_frequencies_exact(model)


class _TakesConversations(LlavaModel):
    """Takes images that no token stands for, and rows of several samples.

    Such images pass tower and projector, and count for nothing. A batch of text alone brings one, so that on every rank
    the same modules take part in forward and backward pass, in the same order: gradients of the projector are reduced,
    and at ZeRO-3 weights gathered, by all ranks together.
    """

    def forward(self, *args: Any, packed_positions: Tensor | None = None, **kwargs: Any) -> Any:
        """packed_positions [B, L] int64: from 0 again wherever another sample of the row begins, and padding."""
        if packed_positions is not None:
            # From positions decoders make masks that keep samples apart, of every form that their attention needs, but
            # only if there is neither a mask nor a cache. `PaddingMask` has taken the mask further up.
            kwargs |= {"position_ids": packed_positions, "attention_mask": None, "use_cache": False}
        return super().forward(*args, **kwargs)

    def get_placeholder_mask(self, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        is_image = input_ids == self.config.image_token_id
        if is_image.any():
            found: Tensor = super().get_placeholder_mask(input_ids, inputs_embeds, image_features)
            return found
        return is_image[..., None]
