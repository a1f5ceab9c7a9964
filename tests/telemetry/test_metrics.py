from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dynmoe_ds.errors import ConfigError, DivergenceError
from dynmoe_ds.telemetry.metrics import (
    METRICS,
    OF_THE_MACHINE,
    Metric,
    is_of_the_machine,
    meaning_of,
    reduce_over_ranks,
    tier_of,
)
from tests.helpers.spawn import run_ranks


def metric(name: str, value: float, reduction: Any = "mean") -> Metric:
    return Metric(name=name, value=value, reduction=reduction)


def test_every_listed_name_has_a_meaning_and_a_group() -> None:
    for name, listed in METRICS.items():
        assert name.partition("/")[0] in ("train", "eval", "moe")
        assert listed.meaning.endswith(".") and "\n" not in listed.meaning
        places = {"<layer>": "model.layers.3.mlp", "<kind>": "odd", "<rank>": "12", "<value>": "p"}
        real = name
        for place, word in places.items():
            real = real.replace(place, word)
        assert (meaning_of(real), tier_of(real)) == (listed.meaning, listed.tier)


def test_what_people_watch_is_brief_and_what_grows_with_the_model_is_not() -> None:
    brief = {name for name, listed in METRICS.items() if listed.tier == "brief"}
    watched = (
        "train/loss",
        "train/learning_rate",
        "train/gradient_norm",
        "eval/loss",
        "moe/mean_k",
        "moe/rank_imbalance",
    )
    assert {*watched, *OF_THE_MACHINE} <= brief
    per_something = {name for name in brief if "<" in name}
    assert per_something == {"moe/live_experts/<layer>", "eval/exact_match/<kind>"}
    assert tier_of("moe/mean_k/a") == tier_of("moe/controller/p/a") == tier_of("train/compute_time_s/3") == "detailed"


def test_clocks_differ_between_runs_that_are_the_same() -> None:
    of_the_machine = ["time_s", "train/wait_time_s", "train/compute_time_s/1", "train/peak_memory_gib"]
    assert [*filter(is_of_the_machine, [*of_the_machine, "step", "train/loss", "moe/mean_k/train/x"])] == of_the_machine


def test_a_metric_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        metric("train/loss", 1.0).value = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "name",
    [
        *("loss", "train/losses", "moe/mean_k/", "train/loss/model.layers.1", "moe/live_experts", "moe/mean_k/<layer>"),
        *("", "moe/mean_k_per_kind", "moe/mean_k_per_kind/", "moe/mean_k_per_kind/odd/", "moe/controller/p"),
        *("train/compute_time_s/", "train/compute_time_s/one", "train/compute_time_s/<rank>"),
        *("moe/mean_k_per_kind/<kind>/a", "moe/controller/<value>/a", "moeXmean_k", "moe/load_entropy/\n"),
    ],
)
def test_a_name_that_is_not_listed_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"There is no metric .*Use one of train/loss, .*metrics\.py"):
        metric(name, 1.0)


def test_a_layer_name_may_hold_slashes() -> None:
    assert metric("moe/mean_k/vision/blocks/1", 1.0).name == "moe/mean_k/vision/blocks/1"
    assert meaning_of("moe/mean_k_per_kind/odd") != meaning_of("moe/mean_k_per_kind/odd/vision/blocks/1")


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train/loss has the reduction 'median'. Use one of mean, sum, max"):
        metric("train/loss", 1.0, "median")


def test_a_tensor_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train/loss has a value of type Tensor.*tensor\.item\(\)"):
        metric("train/loss", torch.tensor(1.0))  # type: ignore[arg-type]


def test_without_ranks_the_metrics_come_back_as_they_are() -> None:
    metrics = [metric("train/loss", 2.0), metric("moe/mean_k", 1.5, "max")]
    assert reduce_over_ranks(metrics) == metrics


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logs metric train/loss 2 times in one step. Log each name once"):
        reduce_over_ranks([metric("train/loss", 2.0), metric("train/loss", 3.0, "max")])


VALUES = {  # name: (reduction, value on rank 0, value on rank 1, worked result)
    "train/loss": ("mean", 2.0, 5.0, 3.5),
    "train/tokens_per_second": ("sum", 1000.25, 2000.5, 3000.75),
    "train/gradient_norm": ("max", -3.0, -7.0, -3.0),
    "train/step_time_s": ("min", 0.25, 0.125, 0.125),
    "train/learning_rate": ("last", 3e-4, 9.0, 3e-4),
    "moe/mean_k/a": ("max", math.nan, 1.0, math.nan),
    "moe/mean_k/b": ("min", 1.0, math.nan, math.nan),
    "moe/mean_k/c": ("mean", math.inf, 1.0, math.inf),
    "train/tokens_seen": ("sum", 2.0**40 + 1, 1.0, 2.0**40 + 2),  # exact in float64 only
}


def on_each_rank(rank: int, world_size: int) -> dict[str, Any]:
    """Everything that the ranks have to agree on, in one spawn."""
    metrics = [metric(name, values[1 + rank], values[0]) for name, values in VALUES.items()]
    if rank == 1:
        metrics.reverse()  # the order is each rank's own
    reduced = reduce_over_ranks(metrics)
    errors = {}
    differing = [metric("train/loss", 1.0), metric("eval/loss", 1.0)][: 2 - rank]
    other_reduction = [metric("train/loss", 1.0, "mean" if rank == 0 else "max")]
    twice = [metric("train/loss", 1.0)] * (1 + rank)
    cases = {
        "differing": differing,
        "other_reduction": other_reduction,
        "twice": twice,
        "twice_everywhere": [metric("train/loss", 1.0)] * 2,
    }
    for case, faulty in cases.items():
        try:
            reduce_over_ranks(faulty)
        except (ConfigError, DivergenceError) as error:
            errors[case] = (type(error).__name__, str(error))
    alone = torch.distributed.new_group([0])
    of_group = reduce_over_ranks([metric("train/loss", 4.0)], group=alone) if rank == 0 else None
    return {
        "order": [one.name for one in reduced] == [one.name for one in metrics],
        "values": {one.name: one.value for one in reduced},
        "empty": reduce_over_ranks([]),
        "errors": errors,
        "of_group": of_group,
    }


def test_two_ranks_agree_on_every_value_and_on_every_error() -> None:
    results = run_ranks(on_each_rank, 2, timeout_s=60)
    for result in results:
        assert result["order"]
        for name, (_, _, _, expected) in VALUES.items():
            assert result["values"][name] == pytest.approx(expected, rel=0, abs=0, nan_ok=True), name
        assert result["empty"] == []
    assert results[0]["errors"] == results[1]["errors"]
    errors = results[0]["errors"]
    assert errors["differing"][0] == "DivergenceError"
    assert "rank 1 lacks eval/loss (mean)" in errors["differing"][1]
    assert "rank 0 lacks" not in errors["differing"][1]
    assert "rank 0 lacks train/loss (max); rank 1 lacks train/loss (mean)" in errors["other_reduction"][1]
    assert errors["twice"] == ("ConfigError", "Rank 1 logs metric train/loss 2 times in one step. Log each name once.")
    assert errors["twice_everywhere"][0] == "ConfigError"
    assert results[0]["of_group"] == [metric("train/loss", 4.0)]


def test_the_docs_have_every_metric_with_its_tier_and_meaning() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| `\w+/", line)]
    listed = [(name, one.tier, one.meaning) for name, one in METRICS.items()]
    assert [(name.strip("`"), tier, meaning) for name, tier, meaning in rows] == listed
