import pytest
import torch

from dynmoe_ds.adaptation import AdaptationConfig, AdaptationController, Decision, register_rule, rule_fault, rules
from dynmoe_ds.adaptation.rules import paper_rule, tokens_per_expert
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import RouterConfig, TopAnyConfig
from tests.adaptation.examples import placement, records

POOL = placement(4, None, 7, 2)  # expert 4 in slot 0, 7 in slot 2, 2 in slot 3


def decide(record, pool=POOL, **options) -> Decision:
    return paper_rule(record, pool, AdaptationConfig(every_steps=1, window_steps=1, **options))


@pytest.mark.parametrize(
    ("tokens_per_slot", "options", "pruned"),
    [
        ([5, 0, 1, 3], {}, ()),
        ([5, 0, 0, 3], {}, (7,)),
        ([0, 0, 0, 3], {}, (4, 7)),
        ([0, 0, 0, 0], {}, (4, 7)),  # the oldest of equals stays
        ([30, 0, 3, 3], {}, ()),
        # The mean of the live is 12, so 10 % of it is 1.2 and 25 % is 3.
        ([30, 0, 1, 5], {"prune_below_share": 0.1}, (7,)),
        ([30, 0, 3, 3], {"prune_below_share": 0.25}, ()),
        ([31, 0, 3, 2], {"prune_below_share": 0.25}, (2,)),
    ],
)
def test_pruning(tokens_per_slot, options, pruned):
    decision = decide(records(tokens_per_slot), **options)
    assert sorted(decision.pruned_ids) == sorted(pruned)
    assert decision.new_gate_row is None


def test_the_last_expert_is_never_pruned():
    assert decide(records([0, 0]), placement(None, 3)).pruned_ids == ()
    # Nobody reaches a share close to 1 of the mean but the busiest.
    assert decide(records([10, 0, 10, 10]), prune_below_share=0.99).pruned_ids == ()
    assert sorted(decide(records([10, 0, 11, 9]), prune_below_share=0.99).pruned_ids) == [2]


def test_growth_takes_the_direction_of_the_unrouted_tokens():
    decision = decide(records([5, 0, 1, 3], num_unrouted=1, unrouted_sum=[3, -4]))
    torch.testing.assert_close(decision.new_gate_row, torch.tensor([0.6, -0.8], dtype=torch.float64))
    assert decision.pruned_ids == ()


@pytest.mark.parametrize(
    ("num_unrouted", "unrouted_sum", "options", "grows"),
    [
        (0, [0, 0], {}, False),
        (2, [0, 0], {}, False),  # R_S = 0 although two tokens were unrouted: no direction to grow in
        (1, [1e-30, 0], {}, True),
        (1, [1, 1], {"min_unrouted_share": 0.01}, False),  # 1 of 100 is not more than 1 %
        (2, [1, 1], {"min_unrouted_share": 0.01}, True),
    ],
)
def test_when_it_grows(num_unrouted, unrouted_sum, options, grows):
    record = records([5, 0, 1, 3], num_unrouted=num_unrouted, unrouted_sum=unrouted_sum)
    assert (decide(record, **options).new_gate_row is not None) == grows


def test_pruning_and_growth_at_once():
    decision = decide(records([5, 0, 0, 3], num_unrouted=3, unrouted_sum=[2, 0]))
    assert decision.pruned_ids == (7,) and decision.new_gate_row.tolist() == [1, 0]


def test_window_without_tokens_changes_nothing():
    decision = decide(records([0, 0, 0, 0], num_tokens=0))
    assert decision.pruned_ids == () and decision.new_gate_row is None


def test_tokens_per_expert_is_in_the_order_of_ids():
    assert list(tokens_per_expert(records([5, 9, 1, 3]), POOL).items()) == [(2, 3), (4, 5), (7, 1)]


def test_own_rule(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))

    @register_rule("prune the oldest")
    def oldest(record, pool, config):
        return Decision(pruned_ids=pool.live_ids[:1], new_gate_row=None)

    controller = AdaptationController(AdaptationConfig(every_steps=1, window_steps=1, rule="prune the oldest"))
    plan, _ = controller.decide({"a": records([1, 1, 1, 1])}, {"a": POOL})
    assert [item.expert_id for item in plan.items] == [2]


class _Router(RouterConfig):
    """A configuration whose tokens always have an expert, as a base of the ones below."""

    def faults(self):
        return []

    def aux_loss_weights(self):
        return {}


class EveryTokenServed(_Router):
    pass


class EqualLoads(_Router):
    may_leave_unrouted = True
    has_equal_loads = True


@pytest.mark.parametrize("rule", ["paper", "split_all", "split_strained", "split_loaded"])
@pytest.mark.parametrize("router", [TopAnyConfig(), EveryTokenServed(), EqualLoads()], ids=lambda r: type(r).__name__)
def test_a_rule_that_makes_no_sense_for_a_router_is_refused(rule, router):
    fault = rule_fault(AdaptationConfig(every_steps=1, window_steps=1, rule=rule), router)
    if (rule, type(router)) == ("paper", EveryTokenServed):
        assert fault is not None and fault.startswith(
            "adaptation.rule is paper, which adds an expert when tokens choose none, but with EveryTokenServed every "
            "token has an expert. Use adaptation.rule="
        )
        options = fault.partition("adaptation.rule=")[2]
        assert "split_all" in options and "split_loaded" in options and "paper" not in options
        assert fault.endswith("or adaptation.last_growth_step=0 to prune only.")
    elif (rule, type(router)) == ("split_loaded", EqualLoads):
        assert fault is not None and fault.startswith(
            "adaptation.rule is split_loaded, which goes by differences of load, but with EqualLoads all experts have "
            "the same load. Use adaptation.rule="
        )
        assert "split_loaded" not in fault.partition("adaptation.rule=")[2]
    else:
        assert fault is None
    pruning = AdaptationConfig(every_steps=1, window_steps=1, rule=rule, last_growth_step=0)
    assert rule_fault(pruning, router) is None


def test_unknown_rule_is_a_fault():
    fault = rule_fault(AdaptationConfig(every_steps=1, window_steps=1, rule="pepper"), TopAnyConfig())
    assert fault is not None and fault.startswith("adaptation.rule is 'pepper'. Use one of ")


def test_taken_name_is_refused():
    with pytest.raises(ConfigError, match="rule called 'paper' is registered already"):
        register_rule("paper")(paper_rule)


def test_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match=r"adaptation\.rule is 'pepper'\. Use one of .*paper"):
        AdaptationController(AdaptationConfig(every_steps=1, window_steps=1, rule="pepper"))
