"""A shape, a layout and a cluster of round numbers, and how to change them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dynmoe_ds.planning import Cluster, Layout, Link, ModelShape
from dynmoe_ds.planning.cluster import FlopRates


def shape(**values: Any) -> ModelShape:
    """Two layers, one of them with 8 experts, of which a token takes exactly 2; 100 tokens in one micro step."""
    base = ModelShape(
        hidden_size=10, num_layers=2, num_moe_layers=1, num_heads=2, dense_ffn_hidden_size=30,
        expert_ffn_hidden_size=20, vocab_size=50, num_experts=8, num_slots=8, is_gated=True, mean_k=2.0,
        is_exact_k=True, dense_tensors=(500, 1500), expert_tensors=(200, 200, 200), dense_flops=4000.0,
        expert_flops=1200, sequence_length=50, micro_batch_size=2, accumulation_steps=1,
    )  # fmt: skip
    return replace(base, **values)


def layout(**values: Any) -> Layout:
    """Four ranks of one node that share all experts, ZeRO-0, float32."""
    base = Layout(
        num_ranks=4, num_nodes=1, ep_size=4, zero_stage=0, dtype="float32", checkpointing=False, chunks=1, by_node=False
    )
    return replace(base, **values)


def cluster(**values: Any) -> Cluster:
    """One node of four ranks, everything at round rates."""
    base = Cluster(
        source="made up", num_nodes=1, ranks_per_node=4, processors_per_node=4, memory_per_rank_gib=1.0,
        commits_on_touch=False, overlap=1.0, float32=FlopRates(dense=1e6, experts=2e6), bfloat16=None,
        memory_bytes_per_s=1e7, optimizer_bytes_per_s=1e6, router_entries_per_s=1e5, layer_s=0.01, slot_s=0.001,
        micro_step_s=0.1, tensor_s=0.002, fetch_s=0.0005,
        within_node=Link(bytes_per_s=1e6, latency_s=0.003), between_nodes=None, held_out=None,
    )  # fmt: skip
    return replace(base, **values)
