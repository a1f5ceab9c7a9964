"""What every kind of expert is: stacked parameters, one entry per slot of this rank."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from dynmoe_ds.errors import ConfigError
from dynmoe_kernels import Activation


class Experts(nn.Module, ABC):
    """Base of all kinds of experts. Every parameter is [s, ...], s slots on this rank; free slots hold zeros.

    unit_dims: which dimension of a parameter counts the F hidden units, for those parameters that have them.
    """

    unit_dims: ClassVar[Mapping[str, int]]

    def __init__(self, num_local_slots: int, hidden_size: int, ffn_hidden_size: int, activation: Activation) -> None:
        """For s slots, D and F. Raises: ConfigError if one of the three is below 1."""
        super().__init__()
        sizes = {"slots on a rank": num_local_slots, "hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size}
        if faults := [f"{name} is {size} but must be at least 1." for name, size in sizes.items() if size < 1]:
            raise ConfigError(faults)
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.activation = activation

    @abstractmethod
    def forward(self, rows: Tensor, row_weights: Tensor, rows_per_slot: Tensor) -> Tensor:
        """`row_weights[i] · E_e(i)(rows[i])` [R, D] for rows [R, D] sorted by slot.

        row_weights [R] float32 or wider. rows_per_slot [s] int64 sums to R, or less: further rows are of no slot, and
        what comes out in their places, also as gradients of rows and weights, is undefined. Connected to all inputs and
        all parameters also when R is 0. Weighting inside means that the expert's output is never stored for the
        weights' gradient.
        """

    @abstractmethod
    def initial(self, seed: int, expert_id: int) -> dict[str, Tensor]:
        """Initial parameters of one expert by name, float32: a function of seed and id, never of the layout."""


def uniform(shape: Sequence[int], fan_in: int, seed: int, expert_id: int, name: str) -> Tensor:
    """Uniform in ±1/sqrt(fan_in), as `torch.nn.Linear` starts, from a generator of its own. float32, on the CPU."""
    bound = fan_in**-0.5
    values = torch.empty(*shape, dtype=torch.float32)  # never the default dtype: other dtypes draw other numbers
    return values.uniform_(-bound, bound, generator=seeded_generator(seed, expert_id, name))


def seeded_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose state is a function of the key alone, on every machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
