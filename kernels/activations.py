"""The activations of experts and their derivatives, in plain torch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu"]
"""gelu: the exact one (erf). gelu_tanh: by tanh, nearly it (Gemma, Phi, SigLIP). quick_gelu: x σ(1.702 x) (CLIP)."""

ACTIVATIONS: tuple[str, ...] = get_args(Activation)
QUICK_GELU_SCALE = 1.702


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation of every element, in a tensor of its own."""
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return torch.sigmoid(QUICK_GELU_SCALE * x).mul_(x)


def activate_backward(grad: Tensor, x: Tensor, activation: Activation) -> Tensor:
    """`grad` times the activation's derivative at `x`."""
    match activation:
        case "silu":
            return torch.ops.aten.silu_backward(grad, x)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, x)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
        case "quick_gelu":
            share = torch.sigmoid(QUICK_GELU_SCALE * x)
            return (1 - share).mul_(QUICK_GELU_SCALE * x).add_(1).mul_(share).mul_(grad)
