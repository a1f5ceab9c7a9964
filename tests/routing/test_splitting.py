"""What routers do when an expert splits: thresholds that halve its load and leave all others alone."""

import pytest
import torch
from torch import Tensor

from dynmoe_ds.routing import BudgetConfig, Router, TopAnyConfig, build_router
from dynmoe_ds.routing.splitting import SplitExpert, halving_threshold

D, SLOTS = 16, 6
LIVE = (0, 1, 3)
PARENT, CHILD = 1, 4


@pytest.mark.parametrize(
    ("scores", "load", "threshold"),
    [
        ([0.9, 0.1, 0.5, 0.3], 2, 0.7),  # one of two
        ([0.9, 0.1, 0.5, 0.3], 4, 0.4),
        ([0.9, 0.1, 0.5, 0.3], 3, 0.7),  # one of three
        ([0.2, -0.6], 2, -0.2),
        ([0.5, 0.5, 0.5, 0.5], 2, 0.5),  # equal scores cannot be told apart
    ],
)
def test_threshold_lets_half_of_the_load_through(scores, load, threshold):
    assert float(halving_threshold(torch.tensor(scores), load)) == pytest.approx(threshold)


def tokens(num_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, D, generator=generator) + 0.5 * torch.ones(D)


def active(*slots: int) -> Tensor:
    return torch.isin(torch.arange(SLOTS), torch.tensor(slots))


def make(**options: object) -> Router:
    """A router over the live slots with different thresholds, biases and a controller that is at work."""
    router = build_router(TopAnyConfig(**options), D, SLOTS)
    with torch.no_grad():
        live = active(*LIVE)
        router.weight.copy_(torch.randn(SLOTS, D, generator=torch.Generator().manual_seed(1)) * live[:, None])
        router.threshold.copy_(torch.tensor([0.05, -0.1, 0.0, 0.2, 0.0, 0.0]))
        if router.budget is not None:
            router.budget.control.fill_(-0.07)
        if "selection_bias" in router.slot_buffers:
            router.selection_bias.copy_(torch.tensor([0.02, -0.03, 0.0, 0.05, 0.0, 0.0]))
    return router


def carry_out(
    router: Router, hidden: Tensor, chose_parent: Tensor, live: tuple[int, ...] = LIVE, child: int = CHILD
) -> None:
    """What surgery does to the router in a split of PARENT, written out."""
    values = {name: param.detach().clone() for name, param in router.slot_parameters().items()}
    values |= {name: router.get_buffer(name).clone() for name in router.slot_buffers}
    for value in values.values():
        value[child] = value[PARENT]
    step = torch.randn(D, generator=torch.Generator().manual_seed(2))
    values["weight"][PARENT] += step
    values["weight"][child] -= step
    given = {name: value.clone() for name, value in values.items()}
    split = SplitExpert(
        parent=PARENT, child=child, active=active(*live, child), hidden=hidden, chose_parent=chose_parent
    )
    changed = router.split(values, split)
    assert all(torch.equal(value, given[name]) for name, value in values.items()), "its input is not its to change"
    with torch.no_grad():
        for name, value in (values | changed).items():
            router.state_dict()[name].copy_(value)  # which shares memory with the router


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 10.0, "weighting": "softmax"},
    "bias": {"bias_update_speed": 0.001},
    "budget": {"budget": BudgetConfig(target_k=1.5)},
    "budget and bias": {"budget": BudgetConfig(target_k=1.5), "bias_update_speed": 0.001},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_halves_share_the_load_and_the_others_keep_their_tokens(options):
    router, hidden = make(**options), tokens(400)
    before = router(hidden, active(*LIVE), None).mask
    carry_out(router, hidden, before[:, PARENT])
    after = router(hidden, active(*LIVE, CHILD), None).mask
    load = int(before[:, PARENT].sum())
    assert 20 < load < 380
    assert after[:, [PARENT, CHILD]].sum(0).tolist() == [load // 2, load // 2]
    assert torch.equal(after[:, [0, 3]], before[:, [0, 3]]), "the other experts keep every token"
    assert not after[:, [2, 5]].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_halves_of_a_softmax_share_the_load(options):
    # The others' scores change with the number of experts, so that they need not keep every token.
    router, hidden = make(**{**options, "score": "softmax"}), tokens(400)
    before = router(hidden, active(*LIVE), None).mask
    carry_out(router, hidden, before[:, PARENT])
    load = int(before[:, PARENT].sum())
    assert 20 < load < 380
    assert router(hidden, active(*LIVE, CHILD), None).mask[:, [PARENT, CHILD]].sum(0).tolist() == [load // 2, load // 2]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_second_split_starts_from_what_the_first_has_left(options):
    router, hidden = make(**options), tokens(400)
    first = router(hidden, active(*LIVE), None).mask
    carry_out(router, hidden, first[:, PARENT])
    second = router(hidden, active(*LIVE, CHILD), None).mask
    carry_out(router, hidden, second[:, PARENT], live=(*LIVE, CHILD), child=5)
    third = router(hidden, active(*LIVE, CHILD, 5), None).mask
    load = int(second[:, PARENT].sum())
    assert third[:, [PARENT, 5]].sum(0).tolist() == [load // 2, load // 2]
    assert torch.equal(third[:, [0, 3, CHILD]], second[:, [0, 3, CHILD]])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num_chosen", [0, 1])
def test_without_tokens_of_the_parent_the_thresholds_are_copied(options, num_chosen):
    router, hidden = make(**options), tokens(50)
    before = router(hidden, active(*LIVE), None).mask
    chose_parent = torch.arange(len(hidden)) < num_chosen
    raw = router.threshold.detach().clone()
    carry_out(router, hidden if num_chosen else hidden[:0], chose_parent if num_chosen else chose_parent[:0])
    after = router(hidden, active(*LIVE, CHILD), None).mask
    assert torch.equal(after[:, [0, 3]], before[:, [0, 3]])
    assert router.threshold[CHILD] == router.threshold[PARENT]
    if not options.get("budget") and not options.get("bias_update_speed"):
        assert torch.equal(router.threshold[[0, 1, 2, 3]], raw[[0, 1, 2, 3]])


def test_the_controller_keeps_its_state():
    router = make(budget=BudgetConfig(target_k=1.5))
    carry_out(router, tokens(100), torch.arange(100) < 60)
    assert float(router.budget.control) == pytest.approx(-0.07) and float(router.budget.error_sum) == 0.0
    assert float(router.level) != 0.0 and router.level.dtype == torch.float64
    assert "level" in router.state_dict()


def test_a_router_without_thresholds_changes_nothing():
    router = build_router("top_p", D, SLOTS)
    split = SplitExpert(
        parent=PARENT, child=CHILD, active=active(*LIVE, CHILD), hidden=tokens(5), chose_parent=torch.ones(5).bool()
    )
    assert router.split({"weight": router.weight.detach()}, split) == {}
