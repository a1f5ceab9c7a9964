"""A Llama-style decoder with random weights, some of whose MLPs are MoELayers."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from dynmoe_ds.config.schema import LanguageDataConfig, LlamaModelConfig, RunConfig
from dynmoe_ds.models.activation_checkpointing import checkpoint_activations
from dynmoe_ds.models.dense import dense_model
from dynmoe_ds.models.shared_experts import shared_expert
from dynmoe_ds.moe import MoELayer, layer_seed


def build_decoder(config: RunConfig, vocab_size: int, eos_token_id: int) -> LlamaForCausalLM:
    """A float32 decoder on the CPU; the MLPs of the layers `config.model.moe_layers()` are MoELayers.

    Weights depend on `config.seed` and the layer alone: they are the same on every rank and for every layout, except
    that a rank holds only its own slots' experts. The global random state is left as it was.
    Raises: ConfigError for sizes that cannot work.
    """
    sizes, data = config.model, config.data
    assert isinstance(sizes, LlamaModelConfig), f"build_decoder was given {type(sizes).__name__}"
    assert isinstance(data, LanguageDataConfig), f"build_decoder was given {type(data).__name__}"
    llama = decoder_backbone(sizes, vocab_size, eos_token_id, data.sequence_length)
    model = dense_model(LlamaForCausalLM, llama, config.seed)
    for index in sizes.moe_layers():
        model.model.layers[index].mlp = MoELayer(
            hidden_size=sizes.hidden_size,
            ffn_hidden_size=sizes.expert_ffn_hidden_size,
            num_experts=sizes.num_experts,
            num_slots=sizes.num_slots,
            ep_size=config.parallel.ep_size,
            router=config.router,
            expert=config.expert.kind,
            seed=layer_seed(config.seed, index),
            shared=shared_expert(llama, sizes.shared_ffn_hidden_size, seed=layer_seed(config.seed, index)),
        )
    checkpoint_activations(model, config.parallel)
    return model


def decoder_backbone(sizes: LlamaModelConfig, vocab_size: int, eos_token_id: int, max_length: int) -> LlamaConfig:
    """The Hugging Face configuration of `build_decoder`'s backbone."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.dense_ffn_hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=max_length,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=sizes.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
