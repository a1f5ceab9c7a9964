"""What every registered router promises, with each of its options in turn. A new router is covered by being registered.

A failure names the router and the option: `top_p[k_max=2]` is the preset `top_p` with that one field changed. What a
router must give is said in `dynmoe_ds/routing/router.py`.
"""

from __future__ import annotations

import copy
import typing
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import dynmoe_ds as dm
from dynmoe_ds.routing import (
    BudgetConfig,
    Router,
    RouterConfig,
    Routing,
    RoutingRecords,
    build_router,
    router_config,
    router_names,
    update_routers,
)
from tests.helpers.no_waiting import NoWaiting
from tests.helpers.reference import assert_near

D, SLOTS, EXPERTS, T = 16, 9, 6, 48
POISON = 50.0

# Values to try for options that routers share, by the name of the field. Fields with a few allowed words are tried with
# each of these.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "num_null_experts": (
        {"num_null_experts": 2, "null_expert": "zero"},
        {"num_null_experts": 3, "null_expert": "identity"},
    ),
    "bias_update_speed": ({"bias_update_speed": 0.05},),
    "k_max": ({"k_max": 2},),
    "budget": ({"budget": BudgetConfig(target_k=2.5)},),
    "k": ({"k": 1}, {"k": SLOTS + 3}),
}


def variants() -> dict[str, RouterConfig]:
    """Every registered preset; of each router's first one also each option by itself, and all of them together."""
    found: dict[str, RouterConfig] = {}
    seen: set[type[RouterConfig]] = set()
    for name in router_names():
        preset = found[name] = router_config(name)
        if type(preset) in seen:
            continue
        seen.add(type(preset))
        for change in _changes(preset):
            config = replace(preset, **change)
            if not config.faults():
                found[f"{name}[{','.join(f'{key}={_word(value)}' for key, value in change.items())}]"] = config
    return found


def _changes(preset: RouterConfig) -> list[dict[str, Any]]:
    known = [field.name for field in fields(preset)]
    changes = [change for option in OPTIONS if option in known for change in OPTIONS[option]]
    hints = typing.get_type_hints(type(preset))
    for option in known:
        if typing.get_origin(hints[option]) is Literal and option != "null_expert":
            words = set(typing.get_args(hints[option])) - {getattr(preset, option)}
            changes += [{option: word} for word in sorted(words)]
    together: dict[str, Any] = {}
    for option in ("num_null_experts", "bias_update_speed", "k_max", "budget"):
        if option in known:
            together |= OPTIONS[option][-1]
    return [*changes, together] if len(together) > 1 else changes


def _word(value: Any) -> str:
    return f"k{value.target_k}" if isinstance(value, BudgetConfig) else str(value)


VARIANTS = variants()
CONTROLLED = [name for name, config in VARIANTS.items() if build_router(config, D, SLOTS).has_controller]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A router with random rows and a controller that has seen a few steps; free slots hold poison."""

    name: str
    router: Router
    active: Tensor

    def __call__(self, hidden: Tensor, real: Tensor | None = None) -> Routing:
        return self.router(hidden, self.active, real)

    def says(self, what: str) -> str:
        return f"{self.name}: {what}"


def make_layer(name: str, *, seed: int = 3, num_slots: int = SLOTS) -> dm.MoELayer:
    return dm.MoELayer(
        hidden_size=D, ffn_hidden_size=4, num_experts=EXPERTS, num_slots=num_slots, router=VARIANTS[name], seed=seed
    )


def make(name: str, *, dtype: torch.dtype = torch.float32, poison: float = POISON, training: bool = True) -> Case:
    layer = make_layer(name)
    router, active = layer.router.to(dtype), layer.active
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for step in range(3):  # a controller's state is then neither zero nor the same for all slots
        hidden = tokens(seed=10 + step, dtype=dtype)
        records = RoutingRecords.of(router(hidden, active, None), hidden, None)
        if router.has_controller:
            update_routers({"layer": router}, {"layer": records}, {"layer": active})
    with torch.no_grad():
        for per_slot in [*router.slot_parameters().values(), *map(router.get_buffer, router.slot_buffers)]:
            per_slot[~active] = poison
    router.train(training)
    return Case(name=f"{name}, {'training' if training else 'evaluation'}", router=router, active=active)


def both_modes(name: str, dtype: torch.dtype = torch.float32) -> list[Case]:
    return [make(name, dtype=dtype, training=training) for training in (True, False)]


def tokens(num_tokens: int = T, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype)


def padding(num_tokens: int = T) -> Tensor:
    """Every third token is padding."""
    return torch.arange(num_tokens) % 3 != 1


def tensors(routing: Routing) -> dict[str, Tensor]:
    """Everything in a routing, by name."""
    found = {name: getattr(routing, name) for name in ("mask", "weights", "unrouted", "passed_through")}
    found |= {f"loss {name}": value for name, value in routing.aux_losses.items()}
    found |= {f"statistic {name}": value for name, value in (routing.statistics or {}).items()}
    return {name: value.detach() for name, value in found.items() if value is not None}


def objective(case: Case, routing: Routing) -> Tensor:
    """A scalar that depends on every weight, and on the losses as training does."""
    generator = torch.Generator().manual_seed(5)
    dtype = routing.weights.dtype
    total = (routing.weights * torch.randn(routing.weights.shape, generator=generator, dtype=dtype)).sum()
    if routing.passed_through is not None:
        total = total + (routing.passed_through * torch.randn(len(routing.mask), generator=generator)).sum()
    factors = case.router.aux_loss_weights()
    return total + sum(factors[name] * value for name, value in routing.aux_losses.items())


def has_null_experts(case: Case) -> bool:
    return getattr(case.router.config, "num_null_experts", 0) > 0


everywhere = pytest.mark.parametrize("name", VARIANTS)


def test_options_are_covered():
    """The list above is found by field names: an option that is renamed must not fall out of it."""
    every_field = {field.name for config in VARIANTS.values() for field in fields(config)}
    assert set(OPTIONS) <= every_field
    for name in ("top_k[num_null_experts=3,null_expert=identity]", "top_p[k_max=2]", "top_p[budget=k2.5]"):
        assert name in VARIANTS


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_types(name, dtype):
    for case in both_modes(name, dtype):
        routing = case(tokens(dtype=dtype), padding())
        assert routing.mask.shape == routing.weights.shape == (T, SLOTS), case.says("mask and weights must be [T, S]")
        assert routing.mask.dtype == torch.bool, case.says("the mask must be bool")
        assert routing.weights.dtype == dtype, case.says(f"weights of a {dtype} model must be {dtype}")
        assert routing.unrouted.shape == (T,) and routing.unrouted.dtype == torch.bool, case.says(
            "unrouted is [T] bool"
        )
        if routing.passed_through is not None:
            assert routing.passed_through.shape == (T,), case.says("passed_through must be [T]")
            assert routing.passed_through.dtype == dtype, case.says("passed_through must be of the weights' dtype")
        factors = case.router.aux_loss_weights()
        for loss, value in routing.aux_losses.items():
            assert loss in factors, case.says(f"aux_loss_weights() has no weight for the loss {loss!r}")
            assert value.shape == () and value.dtype == dtype, case.says(f"loss {loss!r} must be a {dtype} scalar")
        for what, value in tensors(routing).items():
            assert value.isfinite().all(), case.says(f"{what} is not finite")


@everywhere
def test_weights_are_zero_off_the_mask(name):
    for case in both_modes(name):
        routing = case(tokens(), padding())
        assert not routing.weights[~routing.mask].any(), case.says("a weight off the mask is not 0")
        assert routing.weights[routing.mask].any(), case.says("all weights are 0")


@everywhere
@pytest.mark.parametrize("poison", [POISON, -POISON])
def test_free_slots_are_never_chosen_and_change_nothing(name, poison):
    for training in (True, False):
        case, clean = (make(name, poison=value, training=training) for value in (poison, 0.0))
        routing, expected = case(tokens()), tensors(clean(tokens()))
        assert not routing.mask[:, ~case.active].any(), case.says("a free slot was chosen")
        for what, value in tensors(routing).items():
            assert torch.equal(value, expected[what]), case.says(f"{what} depends on what free slots hold")


@everywhere
def test_gradient_reaches_every_live_row_and_no_free_one(name):
    case = make(name)
    hidden = tokens().requires_grad_()
    objective(case, case(hidden)).backward()
    for parameter_name, parameter in case.router.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.isfinite().all(), case.says(f"no finite gradient for {parameter_name}")
        reached = grad.reshape(len(grad), -1).any(1)
        if parameter_name in case.router.shared_parameters:
            assert reached.all(), case.says(f"a row of {parameter_name} gets no gradient")
            continue
        assert not reached[~case.active].any(), case.says(f"a free slot has a gradient for {parameter_name}")
        if parameter_name == "weight":
            assert reached[case.active].all(), case.says("a live gate row gets no gradient from weights or losses")
    assert hidden.grad is not None and hidden.grad.any(), case.says("no gradient for the tokens")


@everywhere
def test_repetition_is_bitwise_equal(name):
    for case in both_modes(name):
        first = tensors(case(tokens(), padding()))
        case(tokens(7, seed=9))
        for what, value in tensors(case(tokens(), padding())).items():
            assert torch.equal(first[what], value), case.says(f"{what} differs on repetition")


@everywhere
def test_forward_stores_nothing(name):
    for case in both_modes(name):
        state = {key: value.clone() for key, value in case.router.state_dict().items()}
        attributes = {module: dict(vars(module)) for module in case.router.modules()}
        objective(case, case(tokens(), padding())).backward()
        for key, value in case.router.state_dict().items():
            assert torch.equal(state[key], value), case.says(f"forward changed {key}; only update() may")
        for module, before in attributes.items():
            assert vars(module) == before, case.says(f"forward stored something in {type(module).__name__}")


@everywhere
@pytest.mark.parametrize(
    ("num_tokens", "real"),
    [(0, None), (1, None), (5, torch.zeros(5, dtype=torch.bool)), (0, torch.zeros(0, dtype=torch.bool))],
    ids=["no token", "one token", "all padding", "no token, with padding"],
)
def test_few_tokens(name, num_tokens, real):
    for case in both_modes(name):
        routing = case(tokens(num_tokens), real)
        assert routing.mask.shape == (num_tokens, SLOTS)
        for what, value in tensors(routing).items():
            assert value.isfinite().all(), case.says(f"{what} is not finite")
        objective(case, routing).backward()
        for parameter_name, parameter in case.router.named_parameters():
            # A gradient that is missing on one rank hangs the others, which wait to reduce it.
            assert parameter.grad is not None, case.says(f"{parameter_name} is not connected to losses and weights")
            assert parameter.grad.isfinite().all(), case.says(f"the gradient of {parameter_name} is not finite")
        if num_tokens != 1:
            assert not routing.mask.any() and not routing.unrouted.any(), case.says("padding was routed")
            for statistic, value in (routing.statistics or {}).items():
                assert not value.any(), case.says(f"statistic {statistic!r} of no token must be 0")


@everywhere
def test_permuting_tokens_permutes_the_result(name):
    order = torch.randperm(T, generator=torch.Generator().manual_seed(6))
    for case in both_modes(name):
        whole, permuted = tensors(case(tokens(), padding())), tensors(case(tokens()[order], padding()[order]))
        for what, value in whole.items():
            if what.startswith(("loss", "statistic")):
                assert_near(permuted[what], value, torch.float32, case.says(what))
            elif value.dtype == torch.bool:
                assert torch.equal(permuted[what], value[order]), case.says(f"{what} is not permuted with the tokens")
            else:
                assert_near(permuted[what], value[order], what=case.says(what))


@everywhere
def test_bounds_of_k(name):
    for case in both_modes(name):
        config = case.router.config
        routing = case(tokens(500))
        k = routing.mask.sum(1)
        assert k.max() <= EXPERTS, case.says(f"{k.max()} experts for a token, with {EXPERTS} live ones")
        if (most := config.most_experts) is not None:
            assert k.max() <= most, case.says(f"{k.max()} experts for a token, with at most {most}")
        assert [getattr(config, bound) for bound in ("k", "k_max") if hasattr(config, bound)] in ([], [most])
        if not config.may_leave_unrouted:
            assert not routing.unrouted.any(), case.says("unrouted tokens, but may_leave_unrouted is False")
        if not has_null_experts(case):
            if not case.router.training or not config.may_leave_unrouted:
                assert k.min() >= 1, case.says("a token without an expert")
            assert routing.unrouted[k == 0].all(), case.says("a token without an expert is not in unrouted")


@everywhere
def test_a_single_live_expert_serves_every_token_in_evaluation(name):
    case = make(name, training=False)
    alone = case.active & (case.active.cumsum(0) == 1)
    mask = case.router(tokens(), alone, None).mask
    assert not mask[:, ~alone].any(), case.says("a free slot was chosen")
    assert has_null_experts(case) or mask[:, alone].all(), case.says("a token without an expert")


@everywhere
def test_records_of_a_layer_are_the_masks_counts(name):
    layer = make_layer(name)
    seen: list[Routing] = []
    layer.router.register_forward_hook(lambda _module, _args, routing: seen.append(routing))
    x, real = tokens(), padding()
    with dm.StepLedger() as ledger:
        y = layer(x, token_mask=real)
    (y.square().sum() + ledger.aux_loss()).backward()
    (record,) = ledger.records().values()
    (routing,) = seen
    assert torch.equal(record.tokens_per_slot, routing.mask.sum(0)), name
    assert int(record.num_tokens) == int(real.sum()), name
    assert int(record.num_assignments) == int(routing.mask.sum()), name
    assert int(record.num_unrouted) == int(routing.unrouted.sum()), name
    for statistic, value in (routing.statistics or {}).items():
        assert torch.equal(record.statistics[statistic], value), (name, statistic)
    assert all(parameter.grad is not None for parameter in layer.parameters()), name


@everywhere
def test_statistics_have_the_declared_shapes_and_add_up(name):
    case = make(name)
    parts = slice(None), slice(0, 20), slice(20, None)
    whole, first, second = (case(tokens()[part], padding()[part]).statistics or {} for part in parts)
    shapes = {statistic: tuple(value.shape) for statistic, value in whole.items()}
    assert shapes == case.router.statistics_shapes(), case.says("statistics are not what statistics_shapes() declares")
    for statistic, value in whole.items():
        assert value.dtype == torch.float64, case.says(f"statistic {statistic!r} must be float64")
        assert not value.requires_grad, case.says(f"statistic {statistic!r} carries a graph")
        assert_near(first[statistic] + second[statistic], value, torch.float32, case.says(statistic))


@everywhere
def test_a_bfloat16_model_is_routed_in_float32(name):
    for case in both_modes(name):
        low = copy.deepcopy(case.router).bfloat16()
        high = copy.deepcopy(low).float()  # the same rounded parameters
        hidden = tokens(300).bfloat16()
        got = tensors(low(hidden, case.active, None))
        for what, value in tensors(high(hidden.float(), case.active, None)).items():
            assert torch.equal(got[what], value), case.says(f"{what} is not computed in float32")


@everywhere
def test_autocast_leaves_the_router_alone(name):
    case = make(name)
    plain = tensors(case(tokens()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = tensors(case(tokens()))
    for what, value in plain.items():
        assert torch.equal(cast[what], value), case.says(f"{what} changes under autocast")


@everywhere
def test_nothing_waits_for_the_device(name):
    for case in both_modes(name):
        hidden, real = tokens().requires_grad_(), padding()
        with NoWaiting():
            objective(case, case(hidden, real)).backward()


def test_waiting_is_noticed():
    for wait in (lambda x: float(x[0]), lambda x: x[x > 0], lambda x: bool((x > 0).any())):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait(torch.ones(2))


@everywhere
def test_buffers_keep_their_precision(name):
    case = make(name)
    low = copy.deepcopy(case.router).bfloat16()
    for buffer_name, buffer in case.router.named_buffers():
        cast = low.get_buffer(buffer_name)
        assert cast.dtype == buffer.dtype and torch.equal(cast, buffer), case.says(f".bfloat16() changed {buffer_name}")


@everywhere
def test_padding_is_in_nothing(name):
    real = padding()
    for case in both_modes(name):
        hidden = torch.where(real[:, None], tokens(), 0.0).requires_grad_()  # as MoELayer leaves it
        other = torch.where(real[:, None], tokens(), 7.0)
        routing, alone = case(hidden, real), tensors(case(tokens()[real]))
        objective(case, routing).backward()
        assert hidden.grad is not None and not hidden.grad[~real].any(), case.says("padding has a gradient")
        for what, value in tensors(routing).items():
            assert torch.equal(tensors(case(other, real))[what], value), case.says(
                f"{what} depends on what padding holds"
            )
            if what.startswith(("loss", "statistic")):
                assert_near(value, alone[what], torch.float32, case.says(f"{what} with padding"))
            elif value.dtype == torch.bool:
                assert torch.equal(value[real], alone[what]), case.says(f"{what} of the others depends on padding")
                assert not value[~real].any(), case.says(f"{what} of padding is not False")
            else:
                assert_near(value[real], alone[what], what=case.says(f"{what} of the others"))
                assert not value[~real].any(), case.says(f"{what} of padding is not 0")


@everywhere
def test_parameters_and_buffers_are_declared(name):
    case = make(name)
    router = case.router
    for parameter_name, parameter in router.slot_parameters().items():
        assert len(parameter) == SLOTS, case.says(f"{parameter_name} has no row per slot: name it in shared_parameters")
    for buffer_name in router.slot_buffers:
        assert router.get_buffer(buffer_name).shape == (SLOTS,), case.says(f"{buffer_name} is not [S]")
    per_slot = {buffer_name for buffer_name, buffer in router.named_buffers() if buffer.shape[:1] == (SLOTS,)}
    assert per_slot == set(router.slot_buffers), case.says("a buffer [S] must be named in slot_buffers")
    assert router.has_controller or not list(router.named_buffers()), case.says("buffers, but has_controller is False")


@pytest.mark.parametrize("name", CONTROLLED)
def test_controllers_move_with_tokens_and_rest_without(name):
    case = make(name)
    router = case.router
    hidden = tokens(seed=20)
    records = RoutingRecords.of(case(hidden), hidden, None)
    empty = RoutingRecords.of(case(hidden[:0]), hidden[:0], None)

    def after(record: RoutingRecords) -> dict[str, Tensor]:
        updated = copy.deepcopy(router)
        update_routers({"layer": updated}, {"layer": record}, {"layer": case.active})
        return dict(updated.named_buffers())

    before, moved = dict(router.named_buffers()), after(records)
    assert any(not torch.equal(before[key], value) for key, value in moved.items()), case.says("nothing was updated")
    for key, value in moved.items():
        assert value.isfinite().all(), case.says(f"{key} is not finite after an update")
        assert value.dtype == before[key].dtype, case.says(f"{key} changed its dtype in an update")
        assert torch.equal(after(records)[key], value), case.says(f"{key} differs on repetition")
        assert torch.equal(after(empty)[key], before[key]), case.says(f"{key} moved in a step without tokens")
    for observable, value in router.observables(case.active).items():
        assert value.shape == () and value.isfinite(), case.says(f"observable {observable!r} must be a finite scalar")


@everywhere
def test_initial_values_depend_on_the_seed_and_not_on_the_pool(name):
    def initial(seed: int, num_slots: int) -> dict[str, Tensor]:
        layer = make_layer(name, seed=seed, num_slots=num_slots)
        per_slot = {*layer.router.slot_parameters(), *layer.router.slot_buffers}
        state = layer.router.state_dict()
        return {key: value[layer.active] if key in per_slot else value for key, value in state.items()}

    small, large, other = initial(1, EXPERTS), initial(1, SLOTS), initial(2, SLOTS)
    for key, value in small.items():
        assert torch.equal(large[key], value), f"{name}: {key} at the start depends on the size of the pool"
        if key.endswith("weight"):
            assert value.any(1).all(), f"{name}: {key} has rows of zeros at the start"
            assert not torch.equal(large[key], other[key]), f"{name}: {key} does not depend on the seed"
