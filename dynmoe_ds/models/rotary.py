"""Rotary position embeddings that stay exact in a model that is cast to 16 bits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

FREQUENCIES = "inv_freq"


def keep_frequencies_exact(model: nn.Module) -> None:
    """Let the frequencies of a Hugging Face decoder's rotary embeddings stay in float32 whatever it is cast to.

    DeepSpeed casts buffers with the parameters. Rounded frequencies would train, but are off by whole radians after a
    few hundred tokens from those that the exported model computes when it is loaded.
    """
    for module in model.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        if any(name.endswith(FREQUENCIES) for name in names) and not isinstance(module, _Exact):
            kind = type(module)
            module.__class__ = type(f"Exact{kind.__name__}", (_Exact, kind), {})


class _Exact(nn.Module):
    """Beside the class of a rotary embedding: moves its frequencies between devices, and casts them to nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Exact:
        exact = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name.endswith(FREQUENCIES)}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(self.get_buffer(name).device))
        return self
