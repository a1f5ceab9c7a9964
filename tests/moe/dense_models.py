"""Small dense models of every family that can be upcycled, and what of each an expert is a copy of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CodeGenConfig,
    CodeGenForCausalLM,
    DeiTConfig,
    DeiTForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import dynmoe_ds as dm

D, F, LAYERS, B, L = 16, 24, 4, 3, 7
SIZES = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
# Weights over the open set sum to 1 for every token, also with an open set of one in training.
AVERAGING = dm.TopAnyConfig(training_fallback="top_1")


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **SIZES, **options))


def bert(**options: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(vocab_size=11, num_labels=3, **SIZES, **options))


def roberta() -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=11, num_labels=3, **SIZES))


def vit(**options: Any) -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES, **options))


def deit() -> DeiTForImageClassification:
    return DeiTForImageClassification(DeiTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES))


def mistral() -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(vocab_size=11, num_key_value_heads=2, **SIZES))


def qwen2() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=11, num_key_value_heads=2, **SIZES))


def stablelm() -> StableLmForCausalLM:
    return StableLmForCausalLM(StableLmConfig(vocab_size=11, num_key_value_heads=2, **SIZES))


def gemma() -> GemmaForCausalLM:
    return GemmaForCausalLM(GemmaConfig(vocab_size=11, num_key_value_heads=2, head_dim=8, **SIZES))


def phi() -> PhiForCausalLM:
    return PhiForCausalLM(PhiConfig(vocab_size=11, **SIZES))


def siglip() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(image_size=8, patch_size=4, **SIZES))


def clip_vision() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **SIZES))


def clip_text() -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(vocab_size=11, eos_token_id=1, **SIZES))


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=11, num_key_value_heads=2, head_dim=8, **SIZES))


def gemma2() -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=11, num_key_value_heads=2, head_dim=8, **SIZES))


def gemma3() -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=11, num_key_value_heads=2, head_dim=8, **SIZES))


def olmo2() -> Olmo2ForCausalLM:
    return Olmo2ForCausalLM(Olmo2Config(vocab_size=11, pad_token_id=1, **SIZES))


def lfm2() -> Lfm2ForCausalLM:
    layer_types = ["conv", "full_attention"] * (LAYERS // 2)
    kept = {"num_key_value_heads": 2, "layer_types": layer_types, "block_auto_adjust_ff_dim": False}
    return Lfm2ForCausalLM(Lfm2Config(vocab_size=11, **kept, **SIZES))


def phi3() -> Phi3ForCausalLM:
    return Phi3ForCausalLM(Phi3Config(vocab_size=11, pad_token_id=0, **SIZES))


def glm() -> GlmForCausalLM:
    return GlmForCausalLM(GlmConfig(vocab_size=11, num_key_value_heads=2, head_dim=8, pad_token_id=0, **SIZES))


def modernbert(**options: Any) -> ModernBertForSequenceClassification:
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    return ModernBertForSequenceClassification(ModernBertConfig(vocab_size=11, num_labels=3, **ids, **SIZES, **options))


def gpt_neox(**options: Any) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=11, **SIZES, **options))


def gptj(**options: Any) -> GPTJForCausalLM:
    sizes = {"n_embd": D, "n_inner": F, "n_layer": LAYERS, "n_head": 2, "rotary_dim": 4}
    return GPTJForCausalLM(GPTJConfig(vocab_size=11, bos_token_id=0, eos_token_id=0, **sizes, **options))


def codegen() -> CodeGenForCausalLM:
    sizes = {"n_embd": D, "n_inner": F, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4}
    return CodeGenForCausalLM(CodeGenConfig(vocab_size=11, bos_token_id=0, eos_token_id=0, **sizes))


def starcoder2(**options: Any) -> Starcoder2ForCausalLM:
    return Starcoder2ForCausalLM(Starcoder2Config(vocab_size=11, **SIZES, **options))


def gpt_neo() -> GPTNeoForCausalLM:
    sizes = {"hidden_size": D, "intermediate_size": F, "num_layers": LAYERS, "num_heads": 2}
    return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=11, attention_types=[[["global", "local"], LAYERS // 2]], **sizes))


def gpt_bigcode() -> GPTBigCodeForCausalLM:
    sizes = {"n_embd": D, "n_inner": F, "n_layer": LAYERS, "n_head": 2}
    return GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=11, resid_pdrop=0.0, **sizes))


def dinov3() -> DINOv3ViTModel:
    return DINOv3ViTModel(DINOv3ViTConfig(image_size=8, patch_size=4, **SIZES))


def distilbert(dropout: float = 0.0) -> DistilBertForSequenceClassification:
    sizes = {"dim": D, "hidden_dim": F, "n_layers": LAYERS, "n_heads": 2}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=11, num_labels=3, dropout=dropout, **sizes))


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "stablelm": stablelm,
    "olmo2": olmo2,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "lfm2": lfm2,
    "phi3": phi3,
    "glm": glm,
    "phi": phi,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "codegen": codegen,
    "starcoder2": starcoder2,
    "gpt_neo": gpt_neo,
    "gpt_bigcode": gpt_bigcode,
    "clip_vision": clip_vision,
    "clip_text": clip_text,
    "siglip": siglip,
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "modernbert": modernbert,
    "vit": vit,
    "deit": deit,
    "dinov3": dinov3,
}
LLAMA_FORM = ("llama", "mistral", "qwen2", "qwen3", "stablelm", "olmo2", "gemma", "gemma2", "gemma3")
GPT_FORMS = ("gptj", "codegen", "gpt_neo", "gpt_bigcode")
PATHS = {
    **dict.fromkeys((*LLAMA_FORM, "phi3", "glm", "phi", "starcoder2"), "model.layers.{}.mlp"),
    **dict.fromkeys(GPT_FORMS, "transformer.h.{}.mlp"),
    **dict.fromkeys(("clip_vision", "clip_text", "siglip"), "encoder.layers.{}.mlp"),
    "lfm2": "model.layers.{}.feed_forward",
    "gpt_neox": "gpt_neox.layers.{}.mlp",
    "bert": "bert.encoder.layer.{}.intermediate",
    "roberta": "roberta.encoder.layer.{}.intermediate",
    "distilbert": "distilbert.transformer.layer.{}.ffn",
    "modernbert": "model.layers.{}.mlp",
    "vit": "vit.layers.{}.mlp",
    "deit": "deit.layers.{}.mlp",
    "dinov3": "model.layer.{}.mlp",
}
KINDS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "stablelm", "olmo2", "lfm2", "phi3", "glm"), "swiglu"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), "geglu_tanh"),
    "modernbert": "geglu",
    **dict.fromkeys(("phi", "siglip", "starcoder2", *GPT_FORMS), "gelu_tanh"),
    **dict.fromkeys(("clip_vision", "clip_text"), "quick_gelu"),
    **dict.fromkeys(("gpt_neox", "bert", "roberta", "distilbert", "vit", "deit", "dinov3"), "gelu"),
}
# Below a layer, the linears that hold an expert's w1, w2 and, of gated ones, w3.
LINEARS = {
    **dict.fromkeys(LLAMA_FORM, ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")),
    **dict.fromkeys(("phi3", "glm"), ("mlp.gate_up_proj", "mlp.down_proj", "mlp.gate_up_proj")),
    **dict.fromkeys(("bert", "roberta"), ("intermediate.dense", "output.dense")),
    **dict.fromkeys(("phi", "clip_vision", "clip_text", "siglip", "vit", "deit"), ("mlp.fc1", "mlp.fc2")),
    **dict.fromkeys(("gptj", "codegen"), ("mlp.fc_in", "mlp.fc_out")),
    **dict.fromkeys(("starcoder2", "gpt_neo", "gpt_bigcode"), ("mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "lfm2": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "modernbert": ("mlp.Wi", "mlp.Wo", "mlp.Wi"),
    "dinov3": ("mlp.up_proj", "mlp.down_proj"),
    "distilbert": ("ffn.lin1", "ffn.lin2"),
}


def make(name: str, **options: Any) -> PreTrainedModel:
    """The model in evaluation mode, with weights large enough for activations to bend."""
    torch.manual_seed(1)
    model = MODELS[name](**options).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(5 if param.dim() > 1 else 1).add_(0.1 * torch.randn_like(param))
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(B, 3, 8, 8, generator=generator).to(next(model.parameters()))}
    return {"input_ids": torch.randint(2, 11, (B, L), generator=generator)}


def copied_parameters(dense: nn.Module, name: str, index: int) -> dict[str, Tensor]:
    """What an expert in the place of layer `index` is a copy of, under the expert's names."""
    found = {}
    for number, linear in enumerate(LINEARS[name], start=1):
        parent = PATHS[name].format(index).rpartition(".")[0]
        for kind, value in dense.get_submodule(f"{parent}.{linear}").named_parameters():
            found[f"{kind[0]}{number}"] = value.detach()
    if LINEARS[name].count(LINEARS[name][0]) == 2:
        found["w1"], found["w3"] = found["w1"][:F], found["w3"][F:]
    return found


def layer_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, dm.MoELayer)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
