"""Operations on rows, each as a Triton kernel and as a plain-torch twin of the same signature.

`swiglu_slots` and `gate_scores` are neither: they are C++ for CPUs, where `can_compute_…` says yes. None of them is
differentiable by itself: `dynmoe_ds` puts them into autograd functions. `selection.py` says which of the two computes;
`docs/kernels.md` what the kernels cost. Nothing here imports `dynmoe_ds`.
"""

from .activations import ACTIVATIONS, Activation
from .cpu.gate_scores import can_compute_gate_scores, gate_cosines, gate_scores, gate_scores_backward
from .cpu.swiglu_slots import can_compute_swiglu_slots, swiglu_slots, swiglu_slots_backward
from .gather_rows import gather_rows
from .plan import PlanIndices, plan
from .products_by_slot import multiply_by_slot, multiply_pairs_by_slot
from .selection import KernelChoiceError, chosen_kernels, forced_kernels, use_triton
from .slot_of_rows import slot_of_rows
from .sum_rows import sum_rows
from .sum_slots import sum_slots
from .top_any_gates import cosine_scores_backward, top_any_gates
from .weighted_activation import weighted_activation, weighted_activation_backward
from .weighted_bias import add_weighted_bias, add_weighted_bias_backward
from .weighted_gated import weighted_gated, weighted_gated_backward

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "KernelChoiceError",
    "PlanIndices",
    "add_weighted_bias",
    "add_weighted_bias_backward",
    "can_compute_gate_scores",
    "can_compute_swiglu_slots",
    "chosen_kernels",
    "cosine_scores_backward",
    "forced_kernels",
    "gate_cosines",
    "gate_scores",
    "gate_scores_backward",
    "gather_rows",
    "multiply_by_slot",
    "multiply_pairs_by_slot",
    "plan",
    "slot_of_rows",
    "sum_rows",
    "sum_slots",
    "swiglu_slots",
    "swiglu_slots_backward",
    "top_any_gates",
    "use_triton",
    "weighted_activation",
    "weighted_activation_backward",
    "weighted_gated",
    "weighted_gated_backward",
]
