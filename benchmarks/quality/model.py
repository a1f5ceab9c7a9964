"""A transformer of 64 channels and two layers, both of whose FFNs are the subject of the comparison."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 4


class DenseFFN(nn.Module):
    """SwiGLU: `w2 (silu(w1 x) * (w3 x))`."""

    def __init__(self, ffn_hidden_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN_SIZE, ffn_hidden_size, bias=False)
        self.w3 = nn.Linear(HIDDEN_SIZE, ffn_hidden_size, bias=False)
        self.w2 = nn.Linear(ffn_hidden_size, HIDDEN_SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    def __init__(self, *, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.qkv = nn.Linear(HIDDEN_SIZE, 3 * HIDDEN_SIZE, bias=False)
        self.out = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, NUM_HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, HIDDEN_SIZE))


class Block(nn.Module):
    def __init__(self, ffn: nn.Module, *, is_causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(HIDDEN_SIZE)
        self.attention = Attention(is_causal=is_causal)
        self.ffn_norm = nn.RMSNorm(HIDDEN_SIZE)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class SmallTransformer(nn.Module):
    """`embed` makes [B, L, D] of a batch's inputs; logits [B, L, num_classes]. `make_ffn(layer)` makes the FFNs."""

    def __init__(
        self,
        embed: nn.Module,
        make_ffn: Callable[[int], nn.Module],
        *,
        max_length: int,
        num_classes: int,
        is_causal: bool,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.positions = nn.Embedding(max_length, HIDDEN_SIZE)
        self.blocks = nn.ModuleList(Block(make_ffn(i), is_causal=is_causal) for i in range(NUM_LAYERS))
        self.norm = nn.RMSNorm(HIDDEN_SIZE)
        self.head = nn.Linear(HIDDEN_SIZE, num_classes, bias=False)

    def forward(self, **inputs: Tensor) -> Tensor:
        x = self.embed(**inputs)
        x = x + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def num_lookup_parameters(self) -> int:
        """Parameters that are looked up, not multiplied with."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))


def initialise(model: nn.Module, seed: int) -> None:
    """Embeddings normal with 0.5, matrices with 1/√fan-in (half of it for the attention's output).

    The dense FFNs start as experts do, uniform in ±1/√fan-in; experts have their own seeds and are left as they are.
    Every module draws from a generator of its own, so that models differ in their FFNs alone.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.5, generator=generator)
            elif isinstance(module, nn.Linear):
                scale = module.in_features**-0.5
                if ".ffn." in name:
                    module.weight.uniform_(-scale, scale, generator=generator)
                else:
                    module.weight.normal_(0, scale / 2 if name.endswith(".out") else scale, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
