"""One run, and the runs of a sweep: their numbers, folders and configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.launching.freeze import sweep_table
from dynmoe_ds.launching.runs import find_num_ranks, load_runs
from tests.launching.helpers import SMOKE, runs_of


def test_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = runs_of("seed=3", run_dir="runs/a")
    assert (runs.folder, runs.is_sweep, runs.num_ranks) == (tmp_path / "runs" / "a", False, 2)
    (config,) = runs.configs
    assert (config.seed, config.run_dir) == (3, f"{tmp_path}/runs/a"), "absolute, for a job that is elsewhere"


def test_a_sweep_has_a_run_for_each_combination_the_last_override_turning_fastest(tmp_path: Path) -> None:
    folder = tmp_path / "a, b"
    runs = load_runs([*SMOKE, "router=top_k,top_p", "adaptation=none", "seed=range(3)", f"run_dir='{folder}'"])
    assert runs.is_sweep and len(runs.configs) == 6
    assert [type(config.router).__name__[:4] for config in runs.configs] == ["TopK"] * 3 + ["TopP"] * 3
    assert [config.seed for config in runs.configs] == [0, 1, 2, 0, 1, 2]
    assert [config.run_dir for config in runs.configs] == [f"{folder}/{number}" for number in range(6)]
    assert runs.folder == folder
    assert sweep_table(runs).splitlines()[:3] == ["run\trouter\tseed", "0\ttop_k\t0", "1\ttop_k\t1"]


def test_every_fault_of_every_run_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_runs([*SMOKE, "optim.lr=1e-3,-1", "parallel.num_ranks=2,4,3", "training.steps=0"])
    assert len(caught.value.faults) == len(set(caught.value.faults))
    for text in (
        "run_dir is not set. A sweep needs a folder for the folders of its runs: run_dir=runs/NAME.",
        "optim.lr is -1.0", "parallel.ep_size is 2 but must divide the 3 ranks", "training.steps is 0",
    ):  # fmt: skip
        assert [fault for fault in caught.value.faults if text in fault], text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=interval(1e-4,1e-3)", "cannot be enumerated. Write them with commas, or as range(START,STOP,STEP)."),
        ("router=glob(top*)", "cannot be enumerated. Write them with commas, or as range(START,STOP,STEP)."),
        ("seed=range(0,2,0)", "cannot be enumerated. Write them with commas, or as range(START,STOP,STEP)."),
        ("seed=range(3,3)", "holds no value. Write at least one, or leave it out."),
        ("seed=shuffle(1,2)", "shuffles its values, so that the same command, given again, would be another sweep."),
        ("seed=shuffle(range(2))", "shuffles its values, so that the same command, given again, would be another"),
    ],
)
def test_a_sweep_has_a_list_of_values_always_the_same(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_runs([*SMOKE, "run_dir=s", override, "parallel.num_ranks=4,3"])
    first, *others = caught.value.faults
    assert repr(override) in first and message in first
    assert [fault for fault in others if "parallel.ep_size is 2 but must divide the 3 ranks" in fault], "with the rest"
    assert find_num_ranks([*SMOKE, override, "parallel.num_ranks=4,3"]) == 4


def test_a_sorted_sweep_is_always_the_same() -> None:
    assert [config.seed for config in runs_of("seed=sort(3,1)").configs] == [1, 3]


def test_the_number_of_ranks_is_known_in_spite_of_other_faults() -> None:
    assert find_num_ranks([*SMOKE, "parallel.ep_size=3", "parallel.num_ranks=6,4", "optim.lrr=1"]) == 6
    for wrong in ("parallel.num_ranks=many", "parallel.num_ranks=0", "seed=${nothing}"):
        assert find_num_ranks([*SMOKE, wrong]) is None


def test_runs_of_a_sweep_have_as_many_ranks() -> None:
    with pytest.raises(ConfigError, match=r"parallel.num_ranks is 2 and 4 in runs of one sweep, but all get the same"):
        runs_of("parallel.num_ranks=2,4")


def test_a_quoted_comma_is_no_sweep() -> None:
    (config,) = runs_of("training.sample_prompt='a, b'").configs
    assert config.training.sample_prompt == "a, b"
