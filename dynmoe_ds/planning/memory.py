"""What one rank must hold at the fullest moment of a step."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dynmoe_ds.planning.cluster import BYTES
from dynmoe_ds.planning.layout import Layout
from dynmoe_ds.planning.model_shape import ModelShape
from dynmoe_ds.planning.work import MAX_LIVE

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size
FLOAT32 = 4
MOMENTS = 2  # Adam's
# Tensors [T, S] in float32 that a router keeps for its backward pass: logits, scores or probabilities, mask and
# weights, and the auxiliary losses' own. Counted for top-k; others differ by one or two.
ROUTER_TENSORS = 6
INDEX_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank by what needs them.

    weights, gradients, masters, moments: as ZeRO splits them; masters are 0 where weights are their own. gathered:
    split weights that are whole while layers run. buffers: DeepSpeed's bucket of gradients under way. activations:
    saved for the backward pass, and the logits with their gradients. update: gradients and what the optimiser needs
    beside its state while it runs. one_layer: what a layer has saved and makes while its backward pass runs.
    gradients_before: what of the gradients is there when the last backward pass begins: those of earlier micro steps,
    or ZeRO-3's, whose place is never given up.
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    gathered: float
    buffers: float
    activations: float
    update: float
    one_layer: float
    gradients_before: float

    @property
    def total(self) -> float:
        """At the fullest moment: where the backward pass begins, where it ends, or in the update."""
        always = self.weights + self.masters + self.moments
        on_the_way = self.gathered + self.buffers
        return always + max(
            self.gradients_before + on_the_way + self.activations,
            self.gradients + on_the_way + self.one_layer,
            self.update,
        )

    def terms(self) -> dict[str, float]:
        """What is there for long, by name, the greatest first."""
        brief = ("update", "one_layer", "gradients_before")
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in brief}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def memory_per_rank(
    model: ModelShape, layout: Layout, *, commits_on_touch: bool, bucket_elements: int = BUCKET_ELEMENTS
) -> Memory:
    """Bytes of a rank.

    With P_d parameters outside the experts and P_e of this rank's slots, n ranks and m replicas of an expert, ZeRO
    splits P into P_d / n + P_e / m: masters and moments from stage 1 on, gradients from 2 on, weights at 3. In bfloat16
    masters are float32 beside the weights; in float32 they are the weights themselves at stage 0 and, in DeepSpeed, a
    copy from stage 1 on. Gradients have the model's dtype. From stage 1 on they pass through a bucket of
    `bucket_elements`, whose memory is reserved whole, and committed as far as gradients fill it. Split weights stay
    whole from the forward to the backward pass while they have at most 10⁹ elements (DeepSpeed's defaults).

    commits_on_touch: as the cluster's.
    """
    width, stage = BYTES[layout.dtype], layout.zero_stage
    slots_per_rank = model.num_slots // layout.ep_size
    of_experts = [slots_per_rank * size for size in model.expert_tensors] * model.num_moe_layers
    whole = model.dense_parameters + sum(of_experts)
    part = model.dense_parameters / layout.num_ranks + sum(of_experts) / layout.edp_size
    optimizer_part = whole if stage == 0 else part
    is_own_master = layout.dtype == "float32" and stage == 0
    gradients = width * (part if stage >= 2 else whole)
    filled = min(bucket_elements, whole) if commits_on_touch else bucket_elements
    return Memory(
        weights=width * (part if stage == 3 else whole),
        gradients=gradients,
        masters=0 if is_own_master else FLOAT32 * optimizer_part,
        moments=MOMENTS * FLOAT32 * optimizer_part,
        gathered=width * min(whole, MAX_LIVE) if stage == 3 else 0,
        buffers=width * filled if stage >= 1 else 0,
        activations=activation_bytes(model, layout),
        gradients_before=gradients if model.accumulation_steps > 1 or stage == 3 else 0,
        one_layer=model.tokens * max(_running_layer_bytes(model, layout)),
        update=_update_bytes(model, layout),
    )


def _update_bytes(model: ModelShape, layout: Layout) -> float:
    """Gradients and what is beside the optimiser's state while it runs.

    At stage 0 gradients are flattened for their all-reduce, experts and all else by themselves, and in bfloat16 copied
    to float32. From stage 1 on a group of parameters after another, experts last, is flattened in float32, and its own
    gradients go; those of later groups are still there.
    """
    width = BYTES[layout.dtype]
    dense, experts = model.dense_parameters, model.expert_parameters(layout.ep_size)
    if layout.zero_stage == 0:
        copies = width * max(dense, experts) if layout.dtype == "float32" else FLOAT32 * (dense + experts)
        return width * (dense + experts) + copies
    dense_part, experts_part = dense / layout.num_ranks, experts / layout.edp_size
    later = width * (experts if layout.zero_stage == 1 else experts_part)
    return max(FLOAT32 * dense_part + later, FLOAT32 * experts_part)


def activation_bytes(model: ModelShape, layout: Layout) -> float:
    """Of one micro step.

    With checkpointing every layer keeps its input alone, and while one runs again what it keeps otherwise; that and the
    logits are not there at the same time.
    """
    width, tokens = BYTES[layout.dtype], model.tokens
    # log-softmax, its gradient and that of the logits, in float32; the final norm.
    head = 3 * FLOAT32 * model.vocab_size + _norm_bytes(model, width)
    if layout.checkpointing:
        inputs = model.num_layers * model.hidden_size * width
        return tokens * (inputs + max(head, *_running_layer_bytes(model, layout)))
    num_dense = model.num_layers - model.num_moe_layers
    layers = num_dense * dense_layer_bytes(model, width) + model.num_moe_layers * moe_layer_bytes(model, width)
    return tokens * (layers + head)


def _running_layer_bytes(model: ModelShape, layout: Layout) -> tuple[float, float]:
    """Per token, of a layer with and one without experts, 0 for none, while its backward pass runs.

    Beside what is saved: the gradients of gate, up and their product, 3 F, and of the rows.
    """
    width = BYTES[layout.dtype]
    row = 3 * model.expert_ffn_hidden_size + model.hidden_size
    moe = moe_layer_bytes(model, width) + (model.mean_k * row + 3 * model.shared_ffn_hidden_size) * width
    dense = dense_layer_bytes(model, width) + (3 * model.dense_ffn_hidden_size + model.hidden_size) * width
    has_dense = model.num_layers > model.num_moe_layers
    return moe if model.num_moe_layers else 0.0, dense if has_dense else 0.0


def dense_layer_bytes(model: ModelShape, width: int) -> float:
    """Per token, of a layer without experts: `_attention_bytes`, and gate, its silu, up and their product, 4 F."""
    return _attention_bytes(model, width) + 4 * model.dense_ffn_hidden_size * width


def moe_layer_bytes(model: ModelShape, width: int) -> float:
    """Per token, of a layer with experts: attention; the router's tensors; k rows, each with gate and up.

    With a gate a row keeps its input, D, and gate and up, 2 F; without one (gelu) its input and the inner vector before
    the activation, F. Beside them a weight and its gradient's place and three positions of the plan. A shared expert
    keeps what a dense FFN does. What was sent and rows that came back are not kept, since sums need only positions.
    """
    width_of_row, inner = model.hidden_size, model.expert_ffn_hidden_size
    kept = width_of_row + (2 if model.is_gated else 1) * inner
    row = kept * width + 2 * FLOAT32 + 3 * INDEX_BYTES
    shared = 4 * model.shared_ffn_hidden_size * width
    return _attention_bytes(model, width) + ROUTER_TENSORS * FLOAT32 * model.num_slots + model.mean_k * row + shared


def _attention_bytes(model: ModelShape, width: int) -> float:
    """Per token: two norms; queries, keys and values after rotation and the attention's output, 4 D; its sums."""
    return 2 * _norm_bytes(model, width) + 4 * model.hidden_size * width + model.num_heads * FLOAT32


def _norm_bytes(model: ModelShape, width: int) -> float:
    """Per token: a float32 copy of the input (the input itself in float32), the normalised and the scaled value."""
    return model.hidden_size * (FLOAT32 + 2 * width) + FLOAT32
