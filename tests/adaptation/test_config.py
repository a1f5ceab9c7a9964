import pytest

from dynmoe_ds.adaptation import AdaptationConfig
from dynmoe_ds.errors import ConfigError


def test_defaults_are_the_paper():
    config = AdaptationConfig(every_steps=6, window_steps=2)
    assert (config.rule, config.min_unrouted_share, config.prune_below_share) == ("paper", 0.0, 0.0)
    assert (config.new_threshold, config.last_growth_step, config.first_step) == ("zero", None, None)
    assert config.rebalance_above is None, "the paper moves no experts"
    assert (config.split_separation, config.split_reset_share) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every_steps": 0, "window_steps": 1}, "adaptation.every_steps is 0 but must be at least 1."),
        (
            {"window_steps": 7},
            "adaptation.window_steps is 7 but must be between 1 and "
            "adaptation.every_steps (6): windows do not overlap.",
        ),
        (
            {"window_steps": 0},
            "adaptation.window_steps is 0 but must be between 1 and "
            "adaptation.every_steps (6): windows do not overlap.",
        ),
        (
            {"seeding": "copy"},
            "adaptation.seeding is 'copy'. Use one of copy_nearest, copy_most_loaded, mean, fresh.",
        ),
        ({"new_threshold": "one"}, "adaptation.new_threshold is 'one'. Use one of zero, mean_of_live."),
        ({"noise": -0.1}, "adaptation.noise is -0.1 but must not be negative."),
        ({"min_unrouted_share": 1.0}, "adaptation.min_unrouted_share is 1.0 but must be at least 0 and below 1."),
        ({"min_unrouted_share": -0.1}, "adaptation.min_unrouted_share is -0.1 but must be at least 0 and below 1."),
        ({"prune_below_share": 1.5}, "adaptation.prune_below_share is 1.5 but must be at least 0 and below 1."),
        ({"last_growth_step": -1}, "adaptation.last_growth_step is -1 but must not be negative."),
        (
            {"first_step": 1},
            "adaptation.first_step is 1 but must be at least adaptation.window_steps (2), which are the steps before "
            "it.",
        ),
        ({"split_separation": -0.1}, "adaptation.split_separation is -0.1 but must be finite, at least 0."),
        ({"split_separation": float("inf")}, "adaptation.split_separation is inf but must be finite, at least 0."),
        ({"split_reset_share": 1.5}, "adaptation.split_reset_share is 1.5 but must be between 0 and 1."),
        ({"split_reset_share": -0.5}, "adaptation.split_reset_share is -0.5 but must be between 0 and 1."),
        ({"split_above_load": 0.0}, "adaptation.split_above_load is 0.0 but must be above 0."),
        *(
            (
                {"rebalance_above": value},
                f"adaptation.rebalance_above is {value} but must be finite, at least 1 (equal loads), or null for no "
                "moves.",
            )
            for value in (0.99, float("inf"), float("nan"))
        ),
        *(
            ({"rebalance_cost": value}, f"adaptation.rebalance_cost is {value} but must be finite, at least 0.")
            for value in (-0.01, float("inf"), float("nan"))
        ),
    ],
)
def test_values_that_cannot_work(values, message):
    with pytest.raises(ConfigError) as caught:
        AdaptationConfig(**{"every_steps": 6, "window_steps": 2, **values})
    assert caught.value.faults == (message,) and str(caught.value) == message


def test_all_faults_come_at_once():
    with pytest.raises(ConfigError, match="3 faults in the configuration") as caught:
        AdaptationConfig(every_steps=6, window_steps=9, noise=-1.0, seeding="no")
    assert len(caught.value.faults) == 3
