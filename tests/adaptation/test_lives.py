"""Births and deaths of experts."""

import json

from dynmoe_ds.adaptation import ExpertLives
from dynmoe_ds.moe import Placement


def test_births_and_deaths():
    placement = Placement.initial(2, 4, 1)
    lives = ExpertLives({"a": placement})
    grown = placement.with_new_expert(1)
    lives.note(10, {"a": grown})
    lives.note(20, {"a": grown.without(0).with_new_expert(3).without(3)})  # expert 3 came and went in between
    assert lives.of("a") == {
        0: {"born": 0, "died": 20},
        1: {"born": 0, "died": None},
        2: {"born": 10, "died": None},
        3: {"born": 20, "died": 20},
    }


def test_they_go_through_json():
    lives = ExpertLives({"a": Placement.initial(2, 4, 1)})
    lives.note(5, {"a": Placement.initial(2, 4, 1).without(1)})
    other = ExpertLives({"a": Placement.initial(4, 4, 1)})
    other.restore("a", json.loads(json.dumps(lives.of("a"))))
    assert other.of("a") == lives.of("a")
