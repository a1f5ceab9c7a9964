from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError, PlacementError, RoutingError
from dynmoe_ds.moe import Placement
from dynmoe_ds.moe import layer as module
from dynmoe_ds.routing import BudgetConfig
from tests.helpers.reference import LOSSES, assert_near, expected, parameters, randomise

D, F, SLOTS, EXPERTS = 6, 5, 7, 4  # odd sizes: the loop over experts; 3 free slots
ALL_LOSSES = {f"{name}_weight": 0.1 * i for i, name in enumerate(LOSSES, 1)}
PRESETS = ("top_any", "top_any_recommended", "top_any_authors_code", "top_any_budget")


def make_layer(*, dtype=torch.float64, hidden=D, ffn=F, slots=SLOTS, experts=EXPERTS, **kwargs) -> dm.MoELayer:
    layer = dm.MoELayer(hidden_size=hidden, ffn_hidden_size=ffn, num_experts=experts, num_slots=slots, seed=0, **kwargs)
    return randomise(layer.to(dtype))


def tokens(num_tokens: int, hidden: int = D, dtype=torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)


def check(layer: dm.MoELayer, x: Tensor, real: Tensor | None = None) -> None:
    """The layer against the reference: output, routing, losses, records and every gradient."""
    live = layer.active.nonzero().flatten().tolist()
    loss_weight = tokens(len(x), x.shape[1], seed=2)
    budget = layer.router.budget
    want = expected(
        x,
        parameters(layer),
        live,
        layer.router.config,
        training=layer.training,
        real=real,
        loss_weight=loss_weight,
        control=0.0 if budget is None else float(budget.control),
        bias=getattr(layer.router, "selection_bias", None),
    )
    rows_per_slot, routings = [], []
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args: rows_per_slot.append(args[2])),
        layer.router.register_forward_hook(lambda _, args, routing: routings.append(routing)),
    ]
    x = x.clone().requires_grad_()
    with dm.StepLedger() as ledger:
        y = layer(x, token_mask=real)
    ((y * loss_weight).sum() + ledger.aux_loss()).backward()
    for hook in hooks:
        hook.remove()

    assert y.dtype == x.dtype
    assert_near(y, want.y, what="y")
    assert torch.equal(routings[0].mask, want.mask)
    assert torch.equal(rows_per_slot[0], want.mask.sum(0))
    assert torch.equal(routings[0].weights != 0, want.mask)
    got_losses = routings[0].aux_losses
    assert got_losses.keys() == want.aux_losses.keys()
    # Losses and router gradients are computed in float32 at least, from parameters rounded to the layer's dtype.
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, value in want.aux_losses.items():
        assert_near(got_losses[name], value, wide, name)
    if layer.training:
        assert_near(ledger.aux_loss(), want.aux_loss, wide, "aux_loss")
        (record,) = ledger.records().values()
        assert torch.equal(record.tokens_per_slot, want.mask.sum(0))
        assert int(record.num_tokens) == (len(x) if real is None else int(real.sum()))
        assert int(record.num_assignments) == int(want.mask.sum())
        assert int(record.num_unrouted) == want.num_unrouted
        assert_near(record.unrouted_sum, want.unrouted_sum, wide, "unrouted_sum")
    else:
        assert ledger.records() == {} and float(ledger.aux_loss()) == 0
    for name, leaf in {"x": x, **dict(layer.named_parameters())}.items():
        assert leaf.grad is not None, name
        assert_near(leaf.grad, want.gradients[name], x.dtype, f"gradient of {name}")
        if name != "x":
            free = ~layer.active
            assert not leaf.grad[free].any(), f"gradient of free slots of {name}"


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "options",
    [
        dict(zip(("score", "weighting", "straight_through", "training_fallback"), values, strict=True))
        for values in product(
            ("cosine", "softmax"), ("average", "softmax"), ("all_live", "active_only"), ("none", "top_1")
        )
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_layer_equals_the_formulas(options, expert, training):
    config = dm.TopAnyConfig(temperature=3.0, **options, **ALL_LOSSES)
    layer = make_layer(router=config, expert=expert).train(training)
    with torch.no_grad():
        # Some tokens have no open gate.
        layer.router.threshold += (0.3 if config.score == "cosine" else 0.9) * layer.active
    x = tokens(15)
    check(layer, x)
    assert 0 < int((~layer.router(x, layer.active, None).unrouted).sum()) < 15


def nobody(layer, x):
    layer.router.threshold[layer.active] = 2.0
    return x, None


def everybody_to_one(layer, x):
    layer.router.threshold[layer.active] = 2.0
    layer.router.threshold[layer.placement.slot_of(2)] = -2.0
    return x, None


def all_open(layer, x):
    layer.router.threshold[layer.active] = -2.0
    return x, None


def padding(layer, x):
    x = x.clone()
    real = torch.arange(len(x)) % 3 != 0
    x[~real] *= 1e4  # would show in every sum
    return x, real


def only_padding(layer, x):
    return x, torch.zeros(len(x), dtype=torch.bool)


def zero_vectors(layer, x):
    x = x.clone()
    x[::4] = 0
    return x, None


def zero_vectors_pass_negative_thresholds(layer, x):
    return all_open(layer, zero_vectors(layer, x)[0])


def zero_gate_row(layer, x):
    layer.router.weight[layer.placement.slot_of(1)] = 0
    layer.router.threshold[layer.placement.slot_of(1)] = -0.1
    return x, None


def no_tokens(layer, x):
    return x[:0], None


def one_token(layer, x):
    return x[:1], None


SCENARIOS = (
    nobody,
    everybody_to_one,
    all_open,
    padding,
    only_padding,
    zero_vectors,
    zero_vectors_pass_negative_thresholds,
    zero_gate_row,
    no_tokens,
    one_token,
)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
def test_presets_in_special_cases(scenario, preset, training):
    layer = make_layer(router=preset, expert="gelu" if preset == "top_any" else "swiglu").train(training)
    with torch.no_grad():
        x, real = scenario(layer, tokens(13))
    check(layer, x, real)


def set_controllers(layer: dm.MoELayer, control: float) -> None:
    """What training would bring a budget and a balancing bias to; poison in the bias of free slots."""
    router = layer.router
    if router.budget is not None:
        router.budget.control.fill_(control)
    if layer.router.config.bias_update_speed > 0:
        bias = 0.2 * torch.randn(layer.num_slots, generator=torch.Generator().manual_seed(5))
        router.selection_bias.copy_(torch.where(layer.active, bias, 9.0))


BOUNDED = {
    "k_max": {"k_max": 2},
    "budget": {"budget": BudgetConfig(target_k=1.5)},
    "bias": {"bias_update_speed": 0.1},
    "all": {"k_max": 2, "budget": BudgetConfig(target_k=1.5), "bias_update_speed": 0.1},
    "more than there are": {"k_max": SLOTS + 1, "budget": BudgetConfig(target_k=SLOTS + 1)},
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("straight_through", "fallback"), [("active_only", "none"), ("all_live", "top_1")])
@pytest.mark.parametrize("bounds", BOUNDED)
@pytest.mark.parametrize("score", ["cosine", "softmax"])
def test_bounded_layer_equals_the_formulas(score, bounds, fallback, straight_through, training):
    config = dm.TopAnyConfig(
        score=score,
        temperature=3.0,
        weighting="softmax",
        straight_through=straight_through,
        training_fallback=fallback,
        **ALL_LOSSES,
        **BOUNDED[bounds],
    )
    layer = make_layer(router=config).train(training)
    x, seen = tokens(15), []
    layer.router.register_forward_hook(lambda _, args, routing: seen.append(routing))
    for control in (-0.3, 0.3):  # nearly all gates open; many tokens without any
        set_controllers(layer, control if score == "cosine" else 3 * control)
        layer.zero_grad()
        check(layer, *padding(layer, x))
    most = max(int(routing.mask.sum(1).max()) for routing in seen)
    assert most == 2 if bounds in ("k_max", "all") else most > 2, "the bound is never met: this test could not tell"
    assert bounds not in ("budget", "all") or any(routing.unrouted.any() for routing in seen), "no fallback to try"


def test_of_the_open_gates_those_with_the_greatest_margins_stay():
    full, bound = (make_layer(router=dm.TopAnyConfig(k_max=k_max)) for k_max in (None, 2))
    with torch.no_grad():
        for layer in (full, bound):
            layer.router.threshold -= 0.3
    x = tokens(40)
    every, best = (layer.router(x, layer.active, None).mask for layer in (full, bound))
    assert int((every.sum(1) > 2).sum()) > 10, "the bound has nothing to do"
    assert torch.equal(best.sum(1), every.sum(1).clamp(max=2)) and not (best & ~every).any()


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    ("dtype", "hidden", "ffn"),
    [(torch.float32, 8, 12), (torch.float32, 7, 5), (torch.bfloat16, 8, 16), (torch.bfloat16, 7, 5)],
    ids=["float32-grouped_mm", "float32-loop", "bfloat16-grouped_mm", "bfloat16-loop"],
)
def test_layer_in_lower_precision(dtype, hidden, ffn, expert):
    config = replace(dm.TopAnyConfig(**ALL_LOSSES), weighting="softmax", temperature=4.0, training_fallback="top_1")
    layer = make_layer(router=config, expert=expert, dtype=dtype, hidden=hidden, ffn=ffn)
    x = tokens(33, hidden, dtype)
    check(layer, x)
    check_padding = torch.arange(33) % 5 != 0
    layer.zero_grad()
    check(layer, x, check_padding)


def test_gates_decide_in_float32_with_a_bfloat16_model():
    layer = make_layer(hidden=64, ffn=8, dtype=torch.bfloat16)
    x = tokens(500, 64, torch.bfloat16)
    mask = layer.router(x, layer.active, None).mask
    rows, thresholds = layer.router.weight.double(), layer.router.threshold.double()
    scores = x.double() @ rows.T / x.double().norm(dim=1, keepdim=True) / rows.norm(dim=1)
    assert torch.equal(mask, (scores > thresholds) & layer.active)
    rounded = (scores.bfloat16() > thresholds) & layer.active
    assert not torch.equal(mask, rounded)  # else this test could not tell


def test_autocast_leaves_the_router_alone():
    layer = make_layer(dtype=torch.float32, router=dm.TopAnyConfig(**ALL_LOSSES))
    x = tokens(40, dtype=torch.float32)
    plain = layer.router(x, layer.active, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer.router(x, layer.active, None)
    assert torch.equal(cast.weights, plain.weights) and cast.weights.dtype == torch.float32
    assert all(torch.equal(cast.aux_losses[name], value) for name, value in plain.aux_losses.items())


def test_output_has_the_shape_of_the_input():
    layer = make_layer()
    x = tokens(24)
    y = layer(x)
    assert torch.equal(layer(x.view(2, 3, 4, D)), y.view(2, 3, 4, D))
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    real = torch.arange(24) % 4 != 0
    assert torch.equal(layer(x.view(4, 6, D), token_mask=real.view(4, 6)), layer(x, token_mask=real).view(4, 6, D))
    transposed = x.view(4, 6, D).transpose(0, 1)
    assert_near(layer(transposed), y.view(4, 6, D).transpose(0, 1))


def test_repetition_is_bitwise_equal_and_nothing_is_stored():
    layer = make_layer(dtype=torch.float32, hidden=8, ffn=8, router="top_any_recommended")
    state = {name: value.nan_to_num() for name, value in layer.state_dict().items()}
    attributes = {m: dict(vars(m)) for m in layer.modules()}
    x = tokens(64, 8, torch.float32).requires_grad_()

    def run() -> list[Tensor]:
        with dm.StepLedger() as ledger:
            y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum() + ledger.aux_loss(), [x, *layer.parameters()])]

    first = run()
    layer(tokens(5, 8, torch.float32))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    assert all(torch.equal(value.nan_to_num(), state[name]) for name, value in layer.state_dict().items())
    assert all(vars(m) == attributes[m] for m in layer.modules())


def test_permuted_tokens_give_the_permuted_result():
    layer = make_layer(router="top_any_recommended")
    x = tokens(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert_near(layer(x[order]), layer(x)[order])
    assert torch.equal(layer.router(x[order], layer.active, None).mask, layer.router(x, layer.active, None).mask[order])


def test_pruned_expert_gets_no_rows():
    layer = make_layer(router="top_any_recommended")
    x = tokens(20)
    slot = layer.placement.slot_of(1)
    assert layer.router(x, layer.active, None).mask[:, slot].any()
    layer.placement = layer.placement.without(1)  # weights stay: the mask alone must keep tokens away
    check(layer, x)
    layer.zero_grad()
    check(layer.eval(), x)


def test_a_single_live_expert_has_finite_gradients():
    layer = make_layer(experts=1, slots=1)
    with dm.StepLedger() as ledger:
        y = layer(tokens(9))
    (y.sum() + ledger.aux_loss()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_without_tokens_every_gradient_is_connected_and_zero():
    for preset, expert, hidden in product(PRESETS, ("swiglu", "gelu"), (D, 8)):
        layer = make_layer(router=preset, expert=expert, hidden=hidden, ffn=8, dtype=torch.float32)
        x = torch.zeros(0, hidden, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        for name, param in layer.named_parameters():
            assert param.grad is not None and not param.grad.any(), (preset, expert, name)


def layer_with(**sizes: object) -> dm.MoELayer:
    return dm.MoELayer(**{"hidden_size": 4, "ffn_hidden_size": 4, "num_experts": 2, "num_slots": 4, **sizes})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_experts": 5}, r"num_experts is 5 but must be between 1 and num_slots \(4\)\."),
        ({"num_experts": 0}, r"num_experts is 0 but must be between 1 and num_slots \(4\)\."),
        ({"num_slots": 0}, r"num_experts is 2 but must be between 1 and num_slots \(0\)\."),
        ({"ep_size": 0}, "ep_size is 0 but must be at least 1."),
        ({"ep_size": 3}, r"num_slots is 4 but must be a multiple of ep_size \(3\)\. Use 3 or 6\."),
        ({"ep_size": 8}, r"num_slots is 4 but must be a multiple of ep_size \(8\)\. Use 8\."),
        ({"ep_size": 2}, "ep_size is 2 but there is one data-parallel rank"),
        ({"hidden_size": 0}, "hidden_size is 0 but must be at least 1."),
        ({"ffn_hidden_size": -1}, "ffn_hidden_size is -1 but must be at least 1."),
        ({"expert": "relu"}, "There is no expert called 'relu'. Use one of swiglu, geglu, geglu_tanh, gelu, "),
        ({"router": "top_none"}, "There is no router called 'top_none'."),
    ],
)
def test_sizes_that_cannot_work(sizes, message):
    with pytest.raises(ConfigError, match=message):
        layer_with(**sizes)


def test_kernels_that_do_not_exist_are_refused_before_the_first_forward_pass(monkeypatch):
    monkeypatch.setenv("DYNMOE_KERNELS", "fast")
    with pytest.raises(ConfigError, match=r"DYNMOE_KERNELS is 'fast'\. Use auto, triton or torch\."):
        layer_with()


def test_all_faults_of_the_sizes_come_at_once():
    with pytest.raises(ConfigError, match="2 faults in the configuration") as caught:
        layer_with(num_experts=9, ep_size=0)
    assert len(caught.value.faults) == 2


def test_wrong_width_is_refused():
    with pytest.raises(RoutingError, match=r"The input has shape \[3, 5\] but its last size must be 4\."):
        layer_with()(torch.zeros(3, 5))


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(6, dtype=torch.bool)], ids=["dtype", "shape"])
def test_wrong_token_mask_is_refused(mask):
    with pytest.raises(
        RoutingError, match=r"token_mask is torch\.\w+ of shape .* must be torch.bool of shape \[2, 3\]"
    ):
        layer_with()(torch.zeros(2, 3, 4), token_mask=mask)


def test_placement_of_another_pool_is_refused():
    layer = layer_with()
    with pytest.raises(PlacementError, match="for 8 slots on 2 ranks, but the layer has 4 slots on 1 ranks"):
        layer.placement = Placement.initial(2, 8, 2)


def test_expert_parallel_layer_needs_process_groups(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    layer = layer_with(ep_size=2)
    assert layer.local_slots == range(2, 4)
    with pytest.raises(RoutingError, match=r"ep_size is 2 but torch\.distributed is not initialised"):
        layer(torch.zeros(1, 4))


def test_layer_built_under_deepspeed_zero_init_is_refused(monkeypatch):
    real_build = module.build_router

    def build_as_zero_init_does(*args):
        router = real_build(*args)
        router.weight.ds_id = 0  # DeepSpeed's mark on parameters that it has split
        return router

    monkeypatch.setattr(module, "build_router", build_as_zero_init_does)
    with pytest.raises(ConfigError, match=r"A MoELayer was built under deepspeed\.zero\.Init"):
        layer_with()


def test_repr_says_how_many_slots_are_live():
    assert "2 live of 4 slots, ep_size=1, D=4, F=4" in repr(layer_with())


def test_layer_takes_the_place_of_any_module():
    model = nn.Sequential(nn.Linear(4, 4), layer_with(), nn.LayerNorm(4))
    assert model(torch.randn(2, 3, 4)).shape == (2, 3, 4)


def test_whatever_is_in_padding_reaches_nothing():
    def run(rubbish):
        layer = dm.MoELayer(hidden_size=8, ffn_hidden_size=16, num_experts=3, num_slots=4, seed=0)
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        x[4:] = rubbish
        x.requires_grad_()
        with dm.StepLedger() as ledger:
            y = layer(x, token_mask=torch.arange(6) < 4)
        (y.square().sum() + ledger.aux_loss()).backward()
        (records,) = ledger.records().values()
        return [y, x.grad, records.unrouted_sum, *(p.grad for p in layer.parameters())]

    for clean, spoilt in zip(run(0.0), run(torch.nan), strict=True):
        assert torch.equal(clean, spoilt)


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
def test_autocast_leaves_the_experts_in_the_dtype_of_their_parameters(expert):
    layer = dm.MoELayer(hidden_size=8, ffn_hidden_size=16, num_experts=3, num_slots=4, seed=0, expert=expert)
    x = torch.randn(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert y.dtype == torch.float32
    assert torch.equal(y, layer(x))


def test_a_state_dict_holds_the_placement():
    def grown():
        return dm.MoELayer(hidden_size=8, ffn_hidden_size=16, num_experts=3, num_slots=4, seed=0)

    first, second = grown(), grown()
    first.placement = first.placement.without(1).with_new_expert(3)
    second.load_state_dict(first.state_dict())
    assert second.placement == first.placement and second.placement.next_id == 4
    assert torch.equal(second.active, first.active)
    assert second.placement.expert_ids == (0, None, 2, 3)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_shared_module_takes_tokens_of_another_dtype_as_the_experts_do(autocast):
    layer = layer_with()
    width = layer.hidden_size
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    shared = torch.nn.Linear(width, width)
    if not autocast:
        layer, shared = layer.bfloat16(), shared.bfloat16()
    with torch.autocast("cpu", enabled=autocast):
        of_experts = layer(x)
        beside = shared(x if autocast else x.bfloat16())
        layer.shared = shared
        y = layer(x)
    assert y.dtype == x.dtype and beside.dtype == torch.bfloat16
    assert_near(y, of_experts + beside.float(), torch.bfloat16)
