"""What every router is: scores in, a `Routing` out, nothing kept between calls but what `update` sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing.budget import Budget
from dynmoe_ds.routing.exact_buffers import ExactBuffers

if TYPE_CHECKING:
    from dynmoe_ds.routing.records import RoutingRecords
    from dynmoe_ds.routing.splitting import SplitExpert


class Routing(NamedTuple):
    """A router's decision for T tokens over S slots.

    A named tuple, since ZeRO-3 finds the tensors that a module gives, to gather its parameters before their backward
    pass, in tuples and dictionaries only.

    mask [T, S] bool: the slots each token is sent to. weights [T, S] float32 (float64 for a float64 model):
    combine weights, 0 off the mask, differentiable. aux_losses: scalars by name, not yet weighted. unrouted [T] bool:
    tokens that chose no expert before any fallback. statistics: additive float64 numbers by name that the router's
    `update` needs beside the records, of the shapes that its `statistics_shapes` says; none where it has no
    controller. passed_through [T], as `weights`: the share of a token's own hidden vector in its output, from identity
    experts; None for none.
    """

    mask: Tensor
    weights: Tensor
    aux_losses: dict[str, Tensor]
    unrouted: Tensor
    statistics: dict[str, Tensor] | None = None
    passed_through: Tensor | None = None


class RouterConfig(ABC):
    """Base of every router's configuration: a frozen dataclass of simple types, next to its router.

    may_leave_unrouted: whether a token can choose no expert, which is what growth by Algorithm 1 waits for.
    has_equal_loads: whether all experts take equally many tokens by construction.
    """

    may_leave_unrouted: ClassVar[bool] = False
    has_equal_loads: ClassVar[bool] = False

    @property
    def min_experts(self) -> int:
        """Live experts that a token's choice needs; pruning leaves at least as many."""
        return 1

    @property
    def most_experts(self) -> int | None:
        """The most experts that any token is ever sent to, whatever the mode; None for as many as there are slots."""
        return None

    @abstractmethod
    def faults(self) -> list[str]:
        """One sentence per value that cannot work, each beginning with `router.`."""

    @abstractmethod
    def aux_loss_weights(self) -> dict[str, float]:
        """The weight of every auxiliary loss that the router returns, by name."""


class Router(ExactBuffers, ABC):
    """Base of all routers. Parameters have one row per slot; `weight` [S, D] is the gate.

    A subclass takes `(config, hidden_size, num_slots)` and computes in float32 at least. `forward` keeps no state: what
    a controller learns from (a budget, a balancing bias, moving thresholds) leaves it as records and statistics, is
    summed over all ranks and comes back once per optimiser step through `update`. Controllers live in buffers, which
    keep their precision whatever dtype the model is cast to, and so are in every state dict.

    budget: the controller of mean k, if there is one. slot_buffers: names of buffers [S] that belong to the slots, and
    so follow an expert that moves. shared_parameters: names of parameters without a row per slot.
    """

    weight: nn.Parameter
    budget: Budget | None
    slot_buffers: tuple[str, ...] = ()
    shared_parameters: tuple[str, ...] = ()

    def __init__(self, config: RouterConfig, hidden_size: int, num_slots: int) -> None:
        super().__init__()
        self.config = config
        self.budget = None  # here and not on the class, where it would hide the submodule of a subclass
        self.weight = nn.Parameter(torch.zeros(num_slots, hidden_size))

    @abstractmethod
    def forward(self, hidden: Tensor, active: Tensor, real: Tensor | None) -> Routing:
        """Route `hidden` [T, D] over the live slots `active` [S] bool; `real` [T] bool is False for padding."""

    def slot_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters with one row per slot, by name."""
        return {name: param for name, param in self.named_parameters() if name not in self.shared_parameters}

    @property
    def has_controller(self) -> bool:
        """Whether `update_routers` must be called after every optimiser step."""
        return self.budget is not None

    def initialize(self, num_experts: int, seed: int) -> None:
        """Set what is neither zero nor a gate row: the start of a controller, parameters that no slot has."""

    def aux_loss_weights(self) -> Mapping[str, float | Tensor]:
        """The weight of every auxiliary loss by name; a controller may set some of them."""
        return self.config.aux_loss_weights()

    def statistics_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of `Routing.statistics`, also of a call without tokens."""
        return {}

    def observables(self, active: Tensor) -> dict[str, Tensor]:
        """The controller's values that are worth a line in a plot: scalars by name, equal on all ranks.

        By default those of the budget; a router adds its own, such as `lambda` or `p`. active [S] bool: the live slots.
        """
        if self.budget is None:
            return {}
        return {"budget_control": self.budget.control, "budget_target": self.budget.target(active.sum().double())}

    def update(self, records: RoutingRecords, active: Tensor) -> None:
        """Take in one optimiser step: `records` summed over its micro steps and all data-parallel ranks."""

    def split(self, values: Mapping[str, Tensor], split: SplitExpert) -> dict[str, Tensor]:
        """New values of parameters and buffers by name, whole, where a split needs others than `values`.

        values: parameters [S, ...] and buffers [S] of the slots by name, after the split: `weight` has the two new
        gate rows, everything else of the child is the parent's. Must not change them. A router in which an expert's
        own state says how many tokens it takes gives each of the two half of the parent's here (`halving_threshold`).
        """
        return {}


R = TypeVar("R", bound=type[Router])

_ROUTERS: dict[type[RouterConfig], type[Router]] = {}
_PRESETS: dict[str, Callable[[], RouterConfig]] = {}


def register_router(
    name: str, config_type: type[RouterConfig], **presets: Callable[[], RouterConfig]
) -> Callable[[R], R]:
    """Class decorator that makes a router available as `name`, with further named presets of the same router.

    Raises: ConfigError for a name that is taken.
    """

    def add(router_type: R) -> R:
        makers: dict[str, Callable[[], RouterConfig]] = {name: config_type, **presets}
        for preset, make in makers.items():
            if preset in _PRESETS:
                raise ConfigError(f"A router called {preset!r} is registered already. Choose another name.")
            _PRESETS[preset] = make
        _ROUTERS[config_type] = router_type
        return router_type

    return add


def router_names() -> tuple[str, ...]:
    """The registered names, presets included, in alphabetical order."""
    return tuple(sorted(_PRESETS))


def router_config(router: str | RouterConfig) -> RouterConfig:
    """The configuration behind a registered name; a configuration is returned as it is.

    Raises: ConfigError for an unknown name, an unknown configuration type, or values that cannot work.
    """
    if isinstance(router, str):
        if router not in _PRESETS:
            raise ConfigError(f"There is no router called {router!r}. Use one of {', '.join(router_names())}.")
        router = _PRESETS[router]()
    if type(router) not in _ROUTERS:
        raise ConfigError(
            f"{type(router).__name__} is not the configuration of a registered router. "
            f"Give a name ({', '.join(router_names())}) or the configuration of one of these."
        )
    if faults := router.faults():
        raise ConfigError(faults)
    return router


def build_router(router: str | RouterConfig, hidden_size: int, num_slots: int) -> Router:
    """A router with zero parameters; `MoELayer` fills the rows of live experts.

    Raises: ConfigError as `router_config`.
    """
    config = router_config(router)
    return _ROUTERS[type(config)](config, hidden_size, num_slots)
