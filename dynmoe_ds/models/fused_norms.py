"""RMSNorm in one kernel, for training on GPUs: transformers computes it in half a dozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from dynmoe_ds.integrations.apex import FUSED_RMS_NORM, apex_class

# Those of transformers that scale by the weight itself; Gemma's scales by 1 + weight.
_PLAIN = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MixtralRMSNorm", "Qwen2MoeRMSNorm")


def fuse_norms(model: nn.Module) -> str:
    """Put apex's FusedRMSNorm where it is installed, else torch's, in the place of every plain RMSNorm; which it was.

    Parameters and their names stay. The result is the same up to rounding: in bfloat16 the scale is rounded later.
    """
    found = apex_class(FUSED_RMS_NORM)
    fused = nn.RMSNorm if found is None else found
    for module in list(model.modules()):
        child: Any
        for name, child in module.named_children():
            if type(child).__name__ in _PLAIN:
                norm = fused(tuple(child.weight.shape), eps=child.variance_epsilon)
                norm.weight = child.weight
                norm.train(child.training)
                setattr(module, name, norm)
    return "torch" if found is None else "apex"
