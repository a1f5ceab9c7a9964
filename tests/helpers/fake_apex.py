"""A package called apex with NVIDIA's classes, in plain torch: where it keeps its state is what tests are about.

Source: apex/optimizers/fused_adam.py and apex/normalization/fused_layer_norm.py, read; the real ones need a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_FILES = {
    "apex/__init__.py": "",
    "amp_C.py": "",
    "fused_layer_norm_cuda.py": "",
    "apex/optimizers.py": """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0):
        self.adam_w_mode = adam_w_mode
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["params"][0].device  # no group may be empty
            # One count for the group, a whole number: it goes into a kernel as such.
            group["step"] = group["step"] + 1 if "step" in group else 1
            step, (beta1, beta2) = group["step"], group["betas"]
            assert isinstance(step, int)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p).float()
                    state["exp_avg_sq"] = torch.zeros_like(p).float()
                grad = p.grad if self.adam_w_mode else p.grad + group["weight_decay"] * p
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
                if self.adam_w_mode:
                    update = update + group["weight_decay"] * p
                p.sub_(group["lr"] * update)
""",
    "apex/normalization.py": """
import torch

class FusedRMSNorm(torch.nn.RMSNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps, elementwise_affine)
""",
}


FILES = tuple(_FILES)


def write_fake_apex(folder: Path, *without: str) -> None:
    """Write the package and its extensions into a folder for `sys.path`, without some of the files."""
    for name, text in _FILES.items():
        if name not in without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@contextmanager
def importable_apex(folder: Path, *without: str) -> Iterator[None]:
    """While it is entered the fake is what can be imported, without some of its FILES; then all is as it was.

    What it is without is not found at all, also where the real apex is installed.
    """
    write_fake_apex(folder, *without)
    modules = {module_of(file): file for file in FILES}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(f"{folder}")
        for name, file in modules.items():
            if file in without:
                patch.setitem(sys.modules, name, None)
            else:
                patch.delitem(sys.modules, name, raising=False)
        try:
            yield
        finally:
            for name in modules:
                sys.modules.pop(name, None)
