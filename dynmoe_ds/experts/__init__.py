"""Experts: feed-forward networks with stacked parameters, one entry per slot of this rank."""

from collections.abc import Callable
from functools import partial

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.experts.experts import Experts, seeded_generator
from dynmoe_ds.experts.gated import GatedExperts
from dynmoe_ds.experts.two_layer import TwoLayerExperts

EXPERT_KINDS: dict[str, Callable[[int, int, int], Experts]] = {
    "swiglu": partial(GatedExperts, activation="silu"),
    "geglu": partial(GatedExperts, activation="gelu"),
    "geglu_tanh": partial(GatedExperts, activation="gelu_tanh"),
    "gelu": partial(TwoLayerExperts, activation="gelu"),
    "gelu_tanh": partial(TwoLayerExperts, activation="gelu_tanh"),
    "quick_gelu": partial(TwoLayerExperts, activation="quick_gelu"),
}


def build_experts(kind: str, num_local_slots: int, hidden_size: int, ffn_hidden_size: int) -> Experts:
    """Experts of a kind, all zero; `MoELayer` fills the live slots.

    Raises: ConfigError for an unknown kind or a size below 1.
    """
    if kind not in EXPERT_KINDS:
        raise ConfigError(f"There is no expert called {kind!r}. Use one of {', '.join(EXPERT_KINDS)}.")
    return EXPERT_KINDS[kind](num_local_slots, hidden_size, ffn_hidden_size)


__all__ = ["EXPERT_KINDS", "Experts", "GatedExperts", "TwoLayerExperts", "build_experts", "seeded_generator"]
