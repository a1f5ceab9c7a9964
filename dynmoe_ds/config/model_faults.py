"""What is impossible about a model, its experts, and the data it is to learn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from dynmoe_ds.config.bounds import at_least, multiple
from dynmoe_ds.config.schema import (
    BertClassifierConfig,
    DataConfig,
    ExpertConfig,
    GlueDataConfig,
    ImageFolderConfig,
    LlamaModelConfig,
    LlavaDataConfig,
    LlavaModelConfig,
    MegatronIndexedConfig,
    ModelConfig,
    TextDataConfig,
    TokenShardsConfig,
    TransformerSizes,
    UpcycledConfig,
    ViTClassifierConfig,
)


def _model(model: ModelConfig) -> Iterator[str]:
    yield from _pool(model)
    match model:
        case LlamaModelConfig():
            yield from _llama(model)
        case BertClassifierConfig() | ViTClassifierConfig():
            yield from _upcycled(model)
        case LlavaModelConfig():
            yield from _llava(model)


def _model_for_data(model: ModelConfig, data: DataConfig) -> Iterator[str]:
    match data:
        case TextDataConfig() | TokenShardsConfig() | MegatronIndexedConfig():
            wanted = "llama"
        case GlueDataConfig():
            wanted = "bert_classifier"
        case ImageFolderConfig():
            wanted = "vit_classifier"
        case LlavaDataConfig():
            wanted = "llava"
    if model.name != wanted:
        yield (
            f"model.name is {model.name} but data.name is {data.name}, for which it must be {wanted}. Choose another "
            "`model` or another `data`."
        )
    match model, data:
        case ViTClassifierConfig(sizes=sizes), ImageFolderConfig(image_size=image_size) if sizes is not None:
            yield from multiple(
                "data.image_size", image_size, f"model.sizes.patch_size ({sizes.patch_size})", sizes.patch_size
            )
        case LlavaModelConfig(vision_sizes=sizes), LlavaDataConfig(image_size=image_size) if sizes is not None:
            yield from multiple(
                "data.image_size", image_size, f"model.vision_sizes.patch_size ({sizes.patch_size})", sizes.patch_size
            )


def _expert_for_model(expert: ExpertConfig, model: ModelConfig) -> Iterator[str]:
    if isinstance(model, UpcycledConfig) and expert.kind != "gelu":
        yield (
            f"expert.kind is {expert.kind} but the experts of {model.name} are copies of its FFNs, which are gelu. Use "
            "expert=gelu."
        )


def _pool(model: ModelConfig) -> Iterator[str]:
    yield from at_least("model", model, 1, "num_slots")
    if not 1 <= model.num_experts <= model.num_slots:
        yield (
            f"model.num_experts is {model.num_experts} but must be between 1 and model.num_slots ({model.num_slots}): "
            "every expert needs a slot. Lower the one or raise the other."
        )


def _llama(model: LlamaModelConfig) -> Iterator[str]:
    yield from at_least(
        "model", model, 1, "hidden_size", "num_layers", "num_heads", "dense_ffn_hidden_size", "expert_ffn_hidden_size",
    )  # fmt: skip
    yield from at_least("model", model, 0, "shared_ffn_hidden_size")
    layers = model.num_layers
    if not 1 <= model.moe_every <= layers:
        yield (
            f"model.moe_every is {model.moe_every} but must be between 1 and model.num_layers ({layers}), or no layer "
            "has experts."
        )
    if model.moe_first is not None and not 0 <= model.moe_first < layers:
        yield (
            f"model.moe_first is {model.moe_first} but must be at least 0 and below model.num_layers ({layers}), or "
            "no layer has experts."
        )
    heads = model.num_heads
    # Rotary position embeddings turn pairs of channels.
    yield from multiple("model.hidden_size", model.hidden_size, f"2 x model.num_heads (2 x {heads})", 2 * heads)


def _llava(model: LlavaModelConfig) -> Iterator[str]:
    for part in ("vision", "text"):
        pretrained, sizes = getattr(model, f"{part}_pretrained"), getattr(model, f"{part}_sizes")
        yield from _one_source(f"model.{part}_pretrained", pretrained, f"model.{part}_sizes", sizes)
        if sizes is not None:
            yield from _transformer_sizes(f"model.{part}_sizes", sizes)
    if isinstance(model.moe_layers, tuple):
        yield from _layer_numbers(model.moe_layers, model.text_sizes)
    if (text := model.text_sizes) is not None:
        # Rotary position embeddings turn pairs of channels.
        heads = text.num_heads
        yield from multiple(
            "model.text_sizes.hidden_size", text.hidden_size, f"2 x model.text_sizes.num_heads (2 x {heads})", 2 * heads
        )


def _upcycled(model: UpcycledConfig) -> Iterator[str]:
    sizes = model.sizes if isinstance(model, BertClassifierConfig | ViTClassifierConfig) else None
    yield from _one_source("model.pretrained", model.pretrained, "model.sizes", sizes)
    if not 0 <= model.dropout < 1:
        yield f"model.dropout is {model.dropout} but must be at least 0 and below 1."
    yield from _layer_numbers(model.moe_layers, sizes)
    if sizes is not None:
        yield from _transformer_sizes("model.sizes", sizes)


def _one_source(pretrained_key: str, pretrained: str | None, sizes_key: str, sizes: object) -> Iterator[str]:
    if (pretrained is None) == (sizes is None):
        given = "neither is" if sizes is None else "both are"
        yield (
            f"One of {pretrained_key} and {sizes_key} must be set, but {given}. Name the folder of a pretrained model "
            f"and set {sizes_key}=null, or the other way round for random weights."
        )


def _transformer_sizes(key: str, sizes: TransformerSizes) -> Iterator[str]:
    yield from at_least(key, sizes, 1, *(field.name for field in fields(sizes)))
    heads = sizes.num_heads
    yield from multiple(f"{key}.hidden_size", sizes.hidden_size, f"{key}.num_heads ({heads})", heads)


def _layer_numbers(layers: tuple[int, ...], sizes: TransformerSizes | None) -> Iterator[str]:
    """sizes: of the model, where they are known before its weights are there."""
    if not layers:
        yield "model.moe_layers is empty, so that no layer has experts. Name layers, counted from 0."
    last = None if sizes is None or sizes.num_layers < 1 else sizes.num_layers - 1
    if last is not None and (outside := [layer for layer in layers if not -last - 1 <= layer <= last]):
        yield (
            f"model.moe_layers names {', '.join(map(str, outside))}, but the layers are 0 to {last}, or -1 to "
            f"{-last - 1} from the end."
        )
    from_start = [layer if last is None or layer >= 0 else layer + last + 1 for layer in layers]
    if len(set(from_start)) < len(layers):
        yield f"model.moe_layers is {list(layers)}, which names a layer twice. Name each once."


CHECKS = (_model, _model_for_data, _expert_for_model)
