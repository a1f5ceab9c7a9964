"""Checkpoints of DynMoE's and MoE-LLaVA's authors from their folders alone, with what they see by."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dynmoe_ds.errors import CheckpointError, ConfigError
from dynmoe_ds.export.dynmoe_import import fill_dense_model, has_experts, import_dynmoe_checkpoint
from dynmoe_ds.export.published_families import published_family
from dynmoe_ds.export.weight_files import FolderTensors, TensorViews, View, tensor_shape
from dynmoe_ds.models import dense_model, empty_model
from dynmoe_ds.models.pretrained import pretrained_config, pretrained_model

CONFIG_FILE = "config.json"
_PROJECTOR_TYPE = "mlp2x_gelu"
_PROJECTOR, _TOWER = "model.mm_projector.image_spatial_proj.", "model.image_tower.image_tower.vision_model."
_LINEARS = {"linear_1": "0", "linear_2": "2"}
_VISION_PARTS = ("model.mm_projector.", "model.image_tower.", "model.video_tower.")
_MASK = re.compile(r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.experts_mask")
# Constants that older versions of the authors' modules stored with the weights.
_CONSTANT = re.compile(r".+\.(rotary_emb\.inv_freq|attn\.masked_bias|attn\.logn_tensor|embeddings\.position_ids)")


def import_published_model(
    folder: str | Path,
    vision_tower: str | Path | None = None,
    *,
    text_only: bool = False,
    image_token_id: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """The model in a folder as DynMoE's and MoE-LLaVA's authors publish it, in evaluation mode and the folder's dtype.

        model = dm.import_published_model("DynMoE-StableLM-1.6B", vision_tower="clip-vit-large-patch14-336")
        dm.save_model(model, "imported")  # for load_model, on any number of ranks, and stage.start of a run

    A `LlavaForConditionalGeneration` whose language model is transformers' StableLM, Phi or, of the first Qwen, Qwen2,
    with a `MoELayer` wherever the checkpoint has experts (`import_dynmoe_checkpoint` says which experts, and with what
    router); or, of a checkpoint that sees nothing and with `text_only`, that language model. Checkpoints without
    experts, of the stages before or of the first Qwen itself, become dense models.

    vision_tower: the folder of the CLIP that `mm_image_tower` in the checkpoint's `config.json` names. Its own
    `config.json` says what the tower is; its weights are taken from the checkpoint if they are there, else from it.
    text_only: leaves tower and projector out. image_token_id: the id that stands for an image's patches; None takes the
    first beyond the vocabulary. Rows for ids beyond it are the mean of the others, whose logit is never the greatest.
    seed: what is drawn for later experts is a function of it, of the layer and of the expert's id.

    Raises: ConfigError for a tower that is missing, not needed or another than the projector's, and for what a
    `config.json` says that transformers' classes cannot compute; CheckpointError for files that cannot be read, tensors
    that are missing, have no place or another shape, and layers other than `config.json` says.
    Source: names and formulas of the public code of arXiv 2401.15947 and 2405.14297: `mm_projector.image_spatial_proj`,
    `image_tower.image_tower`, the config's `moe`; a Phi there has no bias in its output layer, which is 0 here.
    """
    folder = Path(folder)
    told = read_published_config(folder)
    family = published_family(told, folder / CONFIG_FILE)
    stored = FolderTensors(folder)
    views = {name: view for name, view in family.views(stored).items() if not _CONSTANT.fullmatch(name)}
    sees = told.get("mm_image_tower") is not None and not text_only
    _check_tower_given(told, folder, vision_tower, sees, text_only)
    text = TensorViews(stored, {name: view for name, view in views.items() if not name.startswith(_VISION_PARTS)})
    vision = TensorViews(stored, {name: view for name, view in views.items() if name.startswith(_VISION_PARTS)})
    _check_layers(told, folder / CONFIG_FILE, text)
    tower_config = _tower_config(told, folder, vision_tower, vision) if sees else None
    decoder = _decoder(family.kind, family.config(told), text, seed)
    if tower_config is None:
        return decoder.eval()
    decoder_config: Any = decoder.config
    image_token_id = decoder_config.vocab_size if image_token_id is None else image_token_id
    _know_token(decoder, image_token_id)
    return _composed(decoder, tower_config, told, vision, f"{vision_tower}", image_token_id).eval()


def read_published_config(folder: Path) -> dict[str, Any]:
    """What stands in a checkpoint's `config.json`. Raises: CheckpointError for a file that is missing or damaged."""
    path = folder / CONFIG_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({type(error).__name__} {error}; seen from {Path.cwd()}). Give the folder "
            "of the checkpoint itself, with all its files."
        ) from error


def _check_tower_given(
    told: Mapping[str, Any], folder: Path, vision_tower: str | Path | None, sees: bool, text_only: bool
) -> None:
    """Raises: ConfigError for a vision tower that is missing or not needed, or parts that cannot be imported."""
    name = told.get("mm_image_tower")
    if sees and vision_tower is None:
        raise ConfigError(
            f"{folder} is a vision-language model that sees by {name}, which is not given. Download that model and "
            "give its folder as vision_tower (--vision-tower), or import the language model alone with text_only "
            "(--text-only)."
        )
    if not sees and vision_tower is not None:
        why = "text_only leaves it out" if text_only else f"{CONFIG_FILE} in {folder} names no mm_image_tower"
        raise ConfigError(f"vision_tower is {str(vision_tower)!r} but {why}. Give one of the two.")
    if not sees:
        return
    wanted = {
        "image_projector_type": (_PROJECTOR_TYPE, "linear"),
        "mm_vision_select_feature": ("patch", "patch"),
        "mm_use_im_start_end": (False, False),
        "mm_video_tower": (None, None),
    }
    faults = [
        f"{folder / CONFIG_FILE}: {key} is {told.get(key, default)!r}, but only {value!r} can be imported. Use "
        "text_only (--text-only) for the language model alone."
        for key, (value, default) in wanted.items()
        if told.get(key, default) != value
    ]
    if not isinstance(told.get("mm_vision_select_layer"), int):
        faults.append(f"{folder / CONFIG_FILE}: it has no mm_vision_select_layer, a number.")
    if faults:
        raise ConfigError(faults)


def _check_layers(told: Mapping[str, Any], path: Path, text: TensorViews) -> None:
    """Raises: CheckpointError if the weights' layers with experts are others than `moe` in config.json says."""
    moe = told.get("moe") or {}
    faults = []
    if moe.get("top_k_experts", -1) != -1 and has_experts(text):
        faults.append(
            f"top_k_experts is {moe['top_k_experts']}: its gates take a fixed number of experts, which is not DynMoE's "
            "layout."
        )
    if moe.get("use_residual"):
        faults.append("use_residual is true: layers with a dense MLP beside their experts cannot be imported.")
    found = {int(match[1]): text.shape(name)[0] for name in text if (match := _MASK.fullmatch(name))}
    layers, places = moe.get("moe_layers_idx"), moe.get("num_experts")
    if not faults and layers is not None and sorted(layers) != sorted(found):
        faults.append(f"moe_layers_idx is {layers}, but the weights have gates in {sorted(found) or 'no layer'}.")
    elif not faults and layers and places and (told_places := dict(zip(layers, places, strict=False))) != found:
        faults.append(f"num_experts is {places}, but the weights have {[found.get(layer) for layer in told_places]}.")
    if faults:
        raise CheckpointError(
            f"{path}: in moe, {' '.join(faults)} Give the {CONFIG_FILE} and all shards of one DynMoE checkpoint."
        )


def _decoder(kind: Any, config: PreTrainedConfig, text: TensorViews, seed: int) -> PreTrainedModel:
    """The language model, in the dtype of its embedding. Raises: CheckpointError, ConfigError, as the import."""
    decoder: Any = dense_model(kind, config, seed)
    dtype = next((text[name].dtype for name in text if name.endswith("embed_tokens.weight")), torch.float32)
    decoder.to(dtype)
    output: Any = decoder.get_output_embeddings()
    if lacks_bias := output.bias is not None and "lm_head.bias" not in text:
        output.bias = None
    if has_experts(text):
        import_dynmoe_checkpoint(decoder, text, seed=seed)
    else:
        fill_dense_model(decoder, text)
    if lacks_bias:
        output.bias = nn.Parameter(torch.zeros(output.out_features, dtype=dtype))
    model: PreTrainedModel = decoder
    return model


def _tower_config(
    told: Mapping[str, Any], folder: Path, vision_tower: str | Path | None, vision: TensorViews
) -> CLIPVisionConfig:
    """Raises: ConfigError for another tower than the projector's; CheckpointError without a projector."""
    found: Any = pretrained_config("vision_tower", f"{vision_tower}", ("clip_vision_model", "clip"))
    config: CLIPVisionConfig = found.vision_config if found.model_type == "clip" else found
    first = f"{_PROJECTOR}{_LINEARS['linear_1']}.weight"
    if first not in vision:
        raise CheckpointError(
            f"{folder} has no {first}, without which the tower's features are nothing to the language model. Give all "
            "shards, or use text_only (--text-only)."
        )
    if (width := tensor_shape(vision, first)[1]) != config.hidden_size:
        raise ConfigError(
            f"vision_tower is {str(vision_tower)!r}, whose features are {config.hidden_size} wide, but the projector "
            f"in {folder} takes {width}. Give the folder of {told['mm_image_tower']}."
        )
    return config


def _know_token(decoder: PreTrainedModel, token_id: int) -> None:
    """Let the decoder have a row for `token_id`."""
    made: Any = decoder
    known = made.config.vocab_size
    if token_id < known:
        return
    made.resize_token_embeddings(token_id + 1, mean_resizing=False)
    parameters = [made.get_input_embeddings().weight, *made.get_output_embeddings().parameters()]
    with torch.no_grad():
        for parameter in {id(parameter): parameter for parameter in parameters}.values():
            parameter[known:] = parameter[:known].float().mean(0)


def _composed(
    decoder: PreTrainedModel,
    tower_config: CLIPVisionConfig,
    told: Mapping[str, Any],
    vision: TensorViews,
    vision_tower: str,
    image_token_id: int,
) -> LlavaForConditionalGeneration:
    """Tower, projector and decoder in one. Raises: CheckpointError and ConfigError for weights that do not fit."""
    text: Any = decoder.config
    config = LlavaConfig(
        vision_config=tower_config,
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=(tower_config.image_size // tower_config.patch_size) ** 2,
        vision_feature_layer=told["mm_vision_select_layer"],
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(text.tie_word_embeddings),
        eos_token_id=text.eos_token_id,
    )
    model = empty_model(LlavaForConditionalGeneration, config)
    projector: nn.Module = LlavaMultiModalProjector(config)
    names = {f"{own}.{kind}": f"{_PROJECTOR}{there}.{kind}" for own, there in _LINEARS.items() for kind in _PARAMETERS}
    fill_dense_model(projector, _renamed(vision, names))
    model.model.multi_modal_projector = projector
    model.model.vision_tower = _tower(tower_config, vision, vision_tower)
    model.model.language_model = decoder.base_model
    model.lm_head = decoder.get_output_embeddings()
    made: Any = model
    made.to(decoder.dtype)
    return model


_PARAMETERS = ("weight", "bias")


def _tower(config: CLIPVisionConfig, vision: TensorViews, folder: str) -> PreTrainedModel:
    """With the checkpoint's weights if they are there: the authors' training saved the tower with the rest."""
    names = {name.removeprefix(_TOWER): name for name in vision if name.startswith(_TOWER)}
    if not names:
        return pretrained_model("vision_tower", CLIPVisionModel, folder, config)
    return fill_dense_model(dense_model(CLIPVisionModel, config, seed=0), _renamed(vision, names))


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> TensorViews:
    """What there is of `tensors` under other names."""
    return TensorViews(tensors, {new: View(name=name) for new, name in names.items() if name in tensors})
