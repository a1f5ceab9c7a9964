"""Activations inside kernels. Each is x times a share between 0 and 1 of it."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import QUICK_GELU_SCALE

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL_PEAK = tl.constexpr(0.3989422804014327)  # 1 / √(2π)
_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 √(2/π): (1 + tanh(u)) / 2 is σ(2u)
_TANH_CUBE = tl.constexpr(0.044715)
_QUICK_SCALE = tl.constexpr(QUICK_GELU_SCALE)


@triton.jit
def activation_share(x, ACTIVATION: tl.constexpr):
    """What of x the activation lets through."""
    if ACTIVATION == "silu":
        return tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return tl.sigmoid((x + x * x * x * _TANH_CUBE) * _TANH_SCALE)
    else:
        tl.static_assert(ACTIVATION == "quick_gelu")
        return tl.sigmoid(x * _QUICK_SCALE)


@triton.jit
def activation_slope(x, share, ACTIVATION: tl.constexpr):
    """The activation's derivative at x: the share plus x times the share's derivative."""
    if ACTIVATION == "silu":
        return share * (1 + x * (1 - share))
    elif ACTIVATION == "gelu":
        return share + x * _NORMAL_PEAK * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        return share * (1 + x * (1 - share) * _TANH_SCALE * (1 + x * x * (3 * _TANH_CUBE)))
    else:
        tl.static_assert(ACTIVATION == "quick_gelu")
        return share * (1 + x * (1 - share) * _QUICK_SCALE)
