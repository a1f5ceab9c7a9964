"""A Llama-style decoder with random weights, some of whose MLPs are MoELayers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dynmoe_ds.config.schema import ParallelConfig, RunConfig
from dynmoe_ds.engine.checkpointing import non_reentrant_checkpoint
from dynmoe_ds.moe import MoELayer


def build_decoder(config: RunConfig, vocab_size: int, eos_token_id: int) -> LlamaForCausalLM:
    """A float32 decoder on the CPU; the MLP of layer i (from 0) is a MoELayer when `moe_every` divides i + 1.

    Weights depend on `config.seed` and the layer alone: they are the same on every rank and for every layout, except
    that a rank holds only its own slots' experts. The global random state is left as it was.
    Raises: ConfigError for sizes that cannot work.
    """
    model = _dense_decoder(config, vocab_size, eos_token_id)
    for index in range(config.model.moe_every - 1, config.model.num_layers, config.model.moe_every):
        model.model.layers[index].mlp = MoELayer(
            hidden_size=config.model.hidden_size,
            ffn_hidden_size=config.model.expert_ffn_hidden_size,
            num_experts=config.model.num_experts,
            num_slots=config.model.num_slots,
            ep_size=config.parallel.ep_size,
            router=config.router,
            expert=config.expert.kind,
            seed=_layer_seed(config.seed, index),
        )
    _checkpoint_activations(model, config.parallel)
    return model


def _dense_decoder(config: RunConfig, vocab_size: int, eos_token_id: int) -> LlamaForCausalLM:
    llama = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.model.hidden_size,
        intermediate_size=config.model.dense_ffn_hidden_size,
        num_hidden_layers=config.model.num_layers,
        num_attention_heads=config.model.num_heads,
        max_position_embeddings=config.data.sequence_length,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would seed the accelerators as well
        model = LlamaForCausalLM(llama)
    model.model.rotary_emb = _ExactRotaryEmbedding(llama)
    return model


def _layer_seed(seed: int, layer_index: int) -> int:
    """One seed per layer, so that layers differ and neighbouring run seeds share none."""
    return int(np.random.SeedSequence([seed, layer_index]).generate_state(1)[0])


class _ExactRotaryEmbedding(LlamaRotaryEmbedding):
    """Keeps its frequencies in float32 when the model is cast to 16 bits.

    DeepSpeed casts buffers with the parameters. Rounded frequencies would train, but are off by whole radians after a
    few hundred tokens from those that the exported model computes when it is loaded.
    """

    inv_freq: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _ExactRotaryEmbedding:
        exact = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = exact.to(self.inv_freq.device)
        return self


def _checkpoint_activations(model: LlamaForCausalLM, parallel: ParallelConfig) -> None:
    """Recompute every decoder layer in the backward pass instead of keeping its activations.

    DeepSpeed's form fails at ZeRO-3, where its recomputation finds parameters that are not gathered (DeepSpeed 0.19.8,
    its issue 4595); `config.validate` refuses that pair.
    """
    kind = parallel.activation_checkpointing
    if kind == "none":
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    if kind == "deepspeed":
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = non_reentrant_checkpoint
