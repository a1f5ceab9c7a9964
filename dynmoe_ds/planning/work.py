"""What one rank does and sends in one optimiser step: counts that no machine changes."""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe_ds.planning.cluster import BYTES
from dynmoe_ds.planning.layout import Layout
from dynmoe_ds.planning.model_shape import ModelShape
from dynmoe_ds.planning.rows import sent_per_token

WEIGHT_BYTES = 4  # combine weights travel in float32
FLOAT32 = 4
ADAM_PASSES = 7
CLIPPING_PASSES = 3
BACKWARD = 2  # gradients of a product's two factors
PERSISTED = 100_000  # DeepSpeed's stage3_param_persistence_threshold
MAX_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """Bytes that a rank sends to others, and collectives that it waits for, by the slowest link they cross."""

    bytes_within: float = 0.0
    bytes_between: float = 0.0
    collectives_within: float = 0.0
    collectives_between: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(
            bytes_within=self.bytes_within + other.bytes_within,
            bytes_between=self.bytes_between + other.bytes_between,
            collectives_within=self.collectives_within + other.collectives_within,
            collectives_between=self.collectives_between + other.collectives_between,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Per rank and optimiser step, under even loads.

    dense_flops, expert_flops: matrix products. router_entries: pairs of token and slot. memory_bytes: of rows and
    activations read and written beside the products. layer_passes, slot_passes, micro_steps, tensors, fetches: what
    costs are fixed per; fetches are the tensors that ZeRO-3 hands to layers and takes back, once per micro step.
    optimizer_bytes: of gradients, masters, moments and weights read and written. dispatch: rows and what
    goes with them. synchronisation: gradients, and weights that ZeRO splits.
    """

    dense_flops: float
    expert_flops: float
    router_entries: float
    memory_bytes: float
    layer_passes: int
    slot_passes: float
    micro_steps: int
    tensors: int
    fetches: int
    optimizer_bytes: float
    dispatch: Sent
    synchronisation: Sent


def work_per_rank(model: ModelShape, layout: Layout) -> Work:
    """What every rank does.

    A forward pass costs its FLOPs once, the backward pass twice, and checkpointing the forward pass of the layers once
    more (the output layer is not in a checkpoint). Every rank of an expert-parallel group gets k T rows for its
    experts, since as many rows come as go.
    """
    passes = 1 + BACKWARD + (1 if layout.checkpointing else 0)
    again = 1 if layout.checkpointing else 0
    steps, tokens = model.accumulation_steps, model.tokens
    tensors = len(model.dense_tensors) + model.num_moe_layers * len(model.expert_tensors)
    head_flops = 2 * model.hidden_size * model.vocab_size
    dense = model.dense_flops * passes - head_flops * again
    entries = tokens * model.num_slots * model.num_moe_layers
    return Work(
        dense_flops=steps * tokens * dense,
        expert_flops=steps * tokens * model.mean_k * model.num_moe_layers * model.expert_flops * passes,
        router_entries=steps * entries * passes,
        memory_bytes=steps * tokens * _moved_elements(model, layout) * BYTES[layout.dtype] * passes,
        layer_passes=steps * model.num_layers * (2 + again),
        slot_passes=steps * model.num_moe_layers * model.num_slots / layout.ep_size * (2 + again),
        micro_steps=steps,
        tensors=tensors,
        fetches=steps * tensors if layout.zero_stage == 3 else 0,
        optimizer_bytes=_optimizer_bytes(model, layout),
        dispatch=dispatch_per_rank(model, layout),
        synchronisation=synchronisation_per_rank(model, layout),
    )


def _moved_elements(model: ModelShape, layout: Layout) -> float:
    """Elements per token that a forward pass reads and writes beside matrix products, of rows and of activations.

    Per layer: two norms, rotary embeddings and two residual sums of about 4 D each, 20 D; the product of gate and up,
    4 F, dense, shared or k times per token. Per layer with experts: gathering k rows and summing them, 2 (k + 1) D,
    and in front of both, with expert parallelism, the same for the rows sent. The logits: 4 V, of softmax and loss.
    """
    sent = sent_per_token(model, layout)
    legs = 0.0 if layout.ep_size == 1 else 1 + sent.rows_within + sent.rows_between
    dense = (model.num_layers - model.num_moe_layers) * 4 * model.dense_ffn_hidden_size
    hidden_units = model.mean_k * model.expert_ffn_hidden_size + model.shared_ffn_hidden_size
    experts = model.num_moe_layers * (4 * hidden_units + 2 * (model.mean_k + 1 + legs) * model.hidden_size)
    return 20 * model.num_layers * model.hidden_size + dense + experts + 4 * model.vocab_size


def dispatch_per_rank(model: ModelShape, layout: Layout) -> Sent:
    """Rows and what goes with them, of all layers and micro steps.

    Forwards a row goes out and one comes back, backwards the gradients of both: 4 times. A checkpoint's recomputation
    ends once everything saved is there again, before rows go back: once more out. Beside each row out go the bits of
    the destination's slots, beside each entry a float32 weight and, backwards, its gradient. Per leg and chunk the
    collectives are rows, bits, weights, rows back; backwards one and two; and per leg once the counts.
    """
    if layout.ep_size == 1:
        return Sent()
    sent, again = sent_per_token(model, layout), 1 if layout.checkpointing else 0
    times = model.tokens * model.num_moe_layers * model.accumulation_steps
    row = model.hidden_size * BYTES[layout.dtype] * (4 + again)
    weight = WEIGHT_BYTES * (2 + again)
    slots_per_rank = model.num_slots // layout.ep_size

    def bits(slots: int) -> int:
        return -(-slots // 8) * (1 + again)

    is_hierarchical = layout.by_node and layout.ep_spans_nodes
    bits_between = bits(slots_per_rank * (layout.ranks_per_node if is_hierarchical else 1))
    per_leg = 1 + again + layout.chunks * (7 + 3 * again)
    passes = model.num_moe_layers * model.accumulation_steps
    between = per_leg * passes if layout.ep_spans_nodes else 0
    within = per_leg * passes if is_hierarchical or not layout.ep_spans_nodes else 0
    return Sent(
        bytes_within=times * (sent.rows_within * (row + bits(slots_per_rank)) + sent.entries_within * weight),
        bytes_between=times * (sent.rows_between * (row + bits_between) + sent.entries_between * weight),
        collectives_within=within,
        collectives_between=between,
    )


def synchronisation_per_rank(model: ModelShape, layout: Layout) -> Sent:
    """Gradients and split weights, in the model's dtype: experts over their replicas, all else over all ranks.

    A ring's all-reduce of B bytes over n ranks sends 2 (n − 1) / n B from each, reduce-scatter and all-gather half of
    that each. ZeRO-0 and 1 reduce once per optimiser step, 2 and 3 once per micro step; 1 and 2 by an all-reduce, of
    which they keep their part (DeepSpeed 0.19's default use_multi_rank_bucket_allreduce), 3 by a reduce-scatter. 1 and
    2 gather the weights after the update. 3 gathers tensors above 100,000 elements in every micro step, once while all
    of them may stay until the backward pass (10⁹ elements), else once more for it; smaller ones stay whole and are
    gathered after the update.
    """
    total = Sent()
    slots_per_rank = model.num_slots // layout.ep_size
    of_experts = [slots_per_rank * size for size in model.expert_tensors] * model.num_moe_layers
    width, steps, stage = BYTES[layout.dtype], model.accumulation_steps, layout.zero_stage
    gathers = 1 if model.dense_parameters + sum(of_experts) <= MAX_LIVE else 2
    for tensors, num_ranks in ((model.dense_tensors, layout.num_ranks), (of_experts, layout.edp_size)):
        if num_ranks == 1:
            continue
        share, everything = (num_ranks - 1) / num_ranks, sum(tensors) * width
        large = sum(size for size in tensors if size > PERSISTED) * width
        num_large = sum(size > PERSISTED for size in tensors)
        if stage == 0:
            amount, collectives = 2 * everything, 1.0
        elif stage < 3:
            amount, collectives = (
                everything * (2 * (steps if stage == 2 else 1) + 1),
                1.0 + (steps if stage == 2 else 1),
            )
        else:
            amount = everything * steps + large * gathers * steps + (everything - large)
            collectives = len(tensors) - num_large + steps * (num_large * gathers + 1)
        # Replicas are a node's size apart or more: where there are several nodes, a group of replicas has all of them.
        if layout.num_nodes == 1:
            total += Sent(bytes_within=share * amount, collectives_within=collectives)
        else:
            total += Sent(bytes_between=share * amount, collectives_between=collectives)
    return total


def _optimizer_bytes(model: ModelShape, layout: Layout) -> float:
    """What the update of a rank's part reads and writes, and what brings gradients to it.

    torch's fused Adam reads weights, gradients and both moments in float32 and writes all but the gradients, 7 passes.
    Clipping reads gradients for their norm, then scales them, 3 in float32. From stage 1 on gradients are copied into a
    bucket, per micro step from stage 2 on, and from there to float32, and weights back from the masters.
    """
    width, stage = BYTES[layout.dtype], layout.zero_stage
    dense, experts = model.dense_parameters, model.expert_parameters(layout.ep_size)
    update = (ADAM_PASSES + CLIPPING_PASSES) * FLOAT32
    if stage == 0:
        return update * (dense + experts)
    part = dense / layout.num_ranks + experts / layout.edp_size
    bucketed = (dense + experts) * (model.accumulation_steps if stage >= 2 else 1)
    return part * (update + 2 * (width + FLOAT32)) + bucketed * 2 * width
