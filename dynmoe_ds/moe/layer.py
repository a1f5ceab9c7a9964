"""The mixture-of-experts layer: router, dispatch and experts behind the interface of an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_ds.dispatch import DispatchConfig, run_all_to_all, run_local
from dynmoe_ds.distributed import Traffic, current_layout, expert_parallel_group, node_groups
from dynmoe_ds.errors import ConfigError, PlacementError, RoutingError
from dynmoe_ds.experts import build_experts, seeded_generator
from dynmoe_ds.moe.ledger import recording_ledger
from dynmoe_ds.moe.padding import PaddingMask
from dynmoe_ds.moe.placement import Placement
from dynmoe_ds.moe.token_shares import TokenShares
from dynmoe_ds.routing import RouterConfig, Routing, build_router
from dynmoe_kernels import KernelChoiceError, chosen_kernels


class MoELayer(nn.Module):
    """A mixture of experts that takes an MLP's place: `y = layer(x)`, x [..., D] -> y [..., D] of the same dtype.

        layer = MoELayer(hidden_size=512, ffn_hidden_size=1024, num_experts=4, num_slots=16, ep_size=2)

    num_experts: live experts at the start. num_slots: places for experts over the whole expert-parallel group, a
    multiple of `ep_size`. ep_size: neighbouring ranks that share the experts; each holds num_slots / ep_size slots.
    router: a registered name or a router's configuration. expert: `swiglu`, `geglu`, `geglu_tanh`, `gelu`, `gelu_tanh`
    or `quick_gelu`. seed: initial weights are a function of it and of the expert's id alone, whatever the layout; None
    draws one from torch's default generator, so that `torch.manual_seed` governs it. shared: a module [T, D] -> [T, D]
    that every token passes beside its experts, such as a shared expert or the dense MLP (a residual FFN); its output is
    added, and it runs while rows travel. dispatch: how rows travel between ranks. tp_group: neighbouring ranks that
    call the layer with the same tokens, as those of a tensor-parallel group do; each routes a share of them, and
    `ep_size` counts ranks with different tokens.

    Parameters: `router.weight` [S, D] and the router's others; `experts.w1` [s, F, D] and so on for this rank's slots.
    `active` [S] bool: the live slots, equal on all ranks.

    With ep_size above 1 every call is collective over the expert-parallel group (and the first call over all ranks,
    unless `dynmoe_ds.initialize` has made the groups): call it on all its ranks, if need be with zero tokens.

    Raises: ConfigError for sizes that cannot work.
    """

    active: Tensor
    expert_ids: Tensor
    next_expert_id: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        ffn_hidden_size: int,
        num_experts: int,
        num_slots: int,
        ep_size: int = 1,
        router: str | RouterConfig = "top_any",
        expert: str = "swiglu",
        seed: int | None = None,
        shared: nn.Module | None = None,
        dispatch: DispatchConfig | None = None,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if faults := layer_faults(num_experts=num_experts, num_slots=num_slots, ep_size=ep_size):
            raise ConfigError(faults)
        try:
            chosen_kernels()
        except KernelChoiceError as error:  # now, and not in the first forward pass
            raise ConfigError(str(error)) from error
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.num_slots, self.ep_size, self.expert_kind = num_slots, ep_size, expert
        self.seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        self.name: str | None = None
        self.ep_group: dist.ProcessGroup | None = None
        self.padding: PaddingMask | None = None
        self.dispatch = DispatchConfig() if dispatch is None else dispatch
        self.shared = shared
        self.token_shares = None if tp_group is None or dist.get_world_size(tp_group) == 1 else TokenShares(tp_group)
        self.local_slots = current_layout(ep_size, self.tp_size).local_slots(num_slots)

        self.experts = build_experts(expert, len(self.local_slots), hidden_size, ffn_hidden_size)
        self.router = build_router(router, hidden_size, num_slots)
        if any(hasattr(param, "ds_id") for param in self.parameters()):
            raise ConfigError(
                "A MoELayer was built under deepspeed.zero.Init, which splits experts over all ranks. Build the model "
                "outside of it: dynmoe_ds.initialize splits the parameters for ZeRO-3 by itself."
            )
        self.register_buffer("active", torch.zeros(num_slots, dtype=torch.bool))
        # The placement once more, so that a state dict holds it: -1 is a free slot.
        self.register_buffer("expert_ids", torch.full((num_slots,), -1))
        self.register_buffer("next_expert_id", torch.tensor(0))
        self.placement = Placement.initial(num_experts, num_slots, ep_size)
        self._fill_live_slots()
        self.sum_gradients()

    @property
    def tp_size(self) -> int:
        """How many ranks hold the same tokens."""
        return 1 if self.token_shares is None else self.token_shares.size

    def sum_gradients(self) -> None:
        """Sum the gradients of the parameters as they are now over the ranks that share out their tokens."""
        if self.token_shares is not None:
            self.token_shares.sum_gradients(self)

    @property
    def dispatch(self) -> DispatchConfig:
        """How rows travel between ranks; may be set between steps, alike on all ranks."""
        return self._dispatch

    @dispatch.setter
    def dispatch(self, dispatch: DispatchConfig) -> None:
        if faults := dispatch.faults_with(self.ep_size):
            raise ConfigError(faults)
        self._dispatch = dispatch

    def dispatch_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups that rows travel over: the expert-parallel group, or that between nodes and that in this node.

        Collective: every rank, at the first call for the sizes, unless an engine has made the groups.
        """
        ranks_per_node = self.dispatch.ranks_per_node
        if ranks_per_node is not None and 1 < ranks_per_node < self.ep_size:
            return node_groups(self.ep_size, ranks_per_node, self.tp_size)
        assert self.ep_group is not None
        return (self.ep_group,)

    @property
    def placement(self) -> Placement:
        """Which slot holds which expert; setting it sets `active`. Weights are not touched."""
        return self._placement

    @placement.setter
    def placement(self, placement: Placement) -> None:
        if (placement.num_slots, placement.ep_size) != (self.num_slots, self.ep_size):
            raise PlacementError(
                f"The placement is for {placement.num_slots} slots on {placement.ep_size} ranks, but the layer has "
                f"{self.num_slots} slots on {self.ep_size} ranks."
            )
        self._placement = placement
        ids = torch.tensor([-1 if expert_id is None else expert_id for expert_id in placement.expert_ids])
        self.expert_ids.copy_(ids)
        self.active.copy_(ids >= 0)
        self.next_expert_id.fill_(placement.next_id)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """y [..., D] for x [..., D]. token_mask [...] bool: True is a real token; padding gives zeros, counts nowhere.

        A token that chooses no expert gets nothing from experts in training, unless the router has a fallback. Under
        autocast the router works in float32 and the experts in the dtype of their parameters.
        Raises: RoutingError for a wrong width, a token mask of another shape, or a reentrant activation checkpoint.
        """
        if x.shape[-1:] != (self.hidden_size,):
            raise RoutingError(f"The input has shape {list(x.shape)} but its last size must be {self.hidden_size}.")
        hidden = x.reshape(-1, self.hidden_size)
        real = self._real_tokens(x, token_mask)
        if real is not None:
            hidden = torch.where(real[:, None], hidden, 0.0)  # padding may hold anything, and 0 x NaN is NaN
        num_tokens = len(hidden)
        if self.token_shares is not None:
            hidden, real = self.token_shares.take(hidden, real)
        routing = self.router(hidden, self.active, real)
        ledger = recording_ledger(self)
        if ledger is not None:
            ledger.add(self, routing, hidden, real, tuple(x.shape[:-1]))
        dtype = next(self.experts.parameters()).dtype
        traffic = ledger.traffic_of(self, routing.mask, dtype) if ledger is not None and self.ep_size > 1 else None
        beside = self._shared_output(hidden, real) if self.shared is not None else None
        with torch.autocast(x.device.type, enabled=False):
            y = self._run_experts(hidden.to(dtype), routing, beside, traffic)
            if routing.passed_through is not None:
                y = y + (routing.passed_through[:, None] * hidden).to(y.dtype)
        y = y.to(x.dtype)
        if ledger is not None:
            ledger.add_output(self, routing, y)
        return (y if self.token_shares is None else self.token_shares.join(y, num_tokens)).view(x.shape)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the constructor of DeepSpeed's engine, before it gives every rank the parameters of rank 0.

        Raises: ConfigError where it would do so to experts: it knows them by the mark that `dynmoe_ds.initialize` sets.
        """
        if self.ep_size > 1 and any(getattr(param, "allreduce", True) for param in self.experts.parameters()):
            raise ConfigError(
                f"A MoELayer with ep_size {self.ep_size} was given to deepspeed.initialize, which would overwrite the "
                "experts of every rank by those of rank 0 and average gradients of different experts. Use "
                "dynmoe_ds.initialize."
            )

    def renew_pool(self, placement: Placement) -> None:
        """Another pool, of any size: router and experts of zeros for it, of the same dtype on the same device.

        Hooks on them stay. Weights do not: `engine.resize_slots` is what carries them over.
        """
        num_slots = placement.num_slots
        dtype, device = self.router.weight.dtype, self.router.weight.device
        self.local_slots = current_layout(self.ep_size, self.tp_size).local_slots(num_slots)
        experts = build_experts(self.expert_kind, len(self.local_slots), self.hidden_size, self.ffn_hidden_size)
        router = build_router(self.router.config, self.hidden_size, num_slots)
        _become(self.experts, experts.to(device=device, dtype=dtype))
        _become(self.router, router.to(device=device, dtype=dtype))
        self.num_slots = num_slots
        self.sum_gradients()
        self.active = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.expert_ids = torch.full((num_slots,), -1, device=device)
        self.placement = placement

    def extra_repr(self) -> str:
        return (
            f"{len(self.placement.live_ids)} live of {self.num_slots} slots, ep_size={self.ep_size}, "
            f"D={self.hidden_size}, F={self.ffn_hidden_size}"
        )

    def _run_experts(
        self, hidden: Tensor, routing: Routing, beside: Callable[[], Tensor] | None, traffic: Traffic | None
    ) -> Tensor:
        if self.ep_size == 1:
            y = run_local(hidden, routing, self.experts, self._most_rows(len(hidden)))
            return y if beside is None else y + beside()
        if self.ep_group is None:
            self.ep_group = self._join_group()
        return run_all_to_all(
            hidden,
            routing,
            self.experts,
            self.dispatch_groups(),
            chunks=self.dispatch.chunks,
            beside=beside,
            traffic=traffic,
        )

    def _most_rows(self, num_tokens: int) -> int | None:
        """Rows to make room for; None for as many as there are."""
        if not self.dispatch.static_shapes:
            return None
        most = self.router.config.most_experts
        return num_tokens * (self.num_slots if most is None else min(most, self.num_slots))

    def _shared_output(self, hidden: Tensor, real: Tensor | None) -> Callable[[], Tensor]:
        """What computes the shared module's output [T, D], 0 for padding, under the autocast that is on now."""
        device = hidden.device.type
        is_autocast = torch.is_autocast_enabled(device)
        autocast = torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=is_autocast)
        dtype = next(self.experts.parameters()).dtype
        tokens = hidden if is_autocast else hidden.to(dtype)

        def compute() -> Tensor:
            assert self.shared is not None
            with autocast:
                output: Tensor = self.shared(tokens).to(dtype)
            return output if real is None else torch.where(real[:, None], output, 0.0)

        return compute

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As every module; the placement comes back with the buffers that hold it."""
        super()._load_from_state_dict(*args, **kwargs)
        ids = [None if id_ < 0 else id_ for id_ in self.expert_ids.tolist()]
        self.placement = Placement(expert_ids=tuple(ids), next_id=int(self.next_expert_id), ep_size=self.ep_size)

    def _real_tokens(self, x: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """[T] bool, False for padding; None if all tokens are real."""
        if token_mask is None:
            token_mask = self.padding.for_hidden(tuple(x.shape[:-1])) if self.padding else None
        elif token_mask.dtype != torch.bool or token_mask.shape != x.shape[:-1]:
            raise RoutingError(
                f"token_mask is {token_mask.dtype} of shape {list(token_mask.shape)} but must be torch.bool of shape "
                f"{list(x.shape[:-1])}, True for real tokens."
            )
        return None if token_mask is None else token_mask.reshape(-1)

    def _join_group(self) -> dist.ProcessGroup:
        if not dist.is_initialized():
            raise RoutingError(
                f"ep_size is {self.ep_size} but torch.distributed is not initialised. Call dynmoe_ds.initialize or "
                "torch.distributed.init_process_group first."
            )
        return expert_parallel_group(self.ep_size, self.tp_size)

    @torch.no_grad()
    def _fill_live_slots(self) -> None:
        self.router.initialize(self.placement.next_id, self.seed)
        first = self.local_slots.start
        rows = orthonormal_rows(self.placement.next_id, self.hidden_size, self.seed)
        for expert_id, slot in self.placement.slots_by_id.items():
            self.router.weight[slot] = rows[expert_id]
            if slot in self.local_slots:
                for name, value in self.experts.initial(self.seed, expert_id).items():
                    self.experts.get_parameter(name)[slot - first] = value


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The layers of a model by their place in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def watch_padding(model: nn.Module) -> PaddingMask:
    """Let every `MoELayer` of `model` know padding by the `attention_mask` [B, L] that the model is called with."""
    padding = PaddingMask()
    padding.watch(model)
    for layer in moe_layers(model).values():
        layer.padding = padding
    return padding


def _become(module: nn.Module, new: nn.Module) -> None:
    """Give `module` the parameters, buffers, children and attributes of `new`; hooks on it stay."""
    module.__dict__.update({name: value for name, value in new.__dict__.items() if "hooks" not in name})


def layer_faults(*, num_experts: int, num_slots: int, ep_size: int) -> list[str]:
    """What is wrong with the sizes of a pool, one sentence each; not whether `ep_size` fits the ranks."""
    found = []
    if num_slots < 1 or not 1 <= num_experts <= num_slots:
        found.append(f"num_experts is {num_experts} but must be between 1 and num_slots ({num_slots}).")
    if ep_size < 1:
        found.append(f"ep_size is {ep_size} but must be at least 1.")
    elif num_slots % ep_size != 0:
        found.append(
            f"num_slots is {num_slots} but must be a multiple of ep_size ({ep_size}). "
            f"Use {' or '.join(str(n * ep_size) for n in (num_slots // ep_size, num_slots // ep_size + 1) if n)}."
        )
    return found


def orthonormal_rows(num_rows: int, hidden_size: int, seed: int) -> Tensor:
    """Gate rows [K, D] of length 1, each at right angles to all earlier ones as long as there are at most D of them.

    Row e depends on the seed and on e alone (Gram-Schmidt over rows 0 … e), never on K. Orthogonal rows let a token
    with threshold 0 start with about half of all experts.
    """
    rows = torch.zeros(num_rows, hidden_size, dtype=torch.float64)
    for e in range(num_rows):
        row = torch.randn(hidden_size, generator=seeded_generator(seed, e, "gate"), dtype=torch.float64)
        if e < hidden_size:
            for _ in range(2):  # twice is enough for full precision
                row = row - rows[:e].T @ (rows[:e] @ row)
        rows[e] = row / torch.linalg.vector_norm(row)
    return rows.float()
