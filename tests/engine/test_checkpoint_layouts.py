"""Checkpoints written and read on layouts, slots and dtypes of every kind, damaged ones, and saves that are cut off."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Move, Plan
from dynmoe_ds.checkpoint import store
from tests.engine import test_killed_save as killed
from tests.engine.test_checkpoint import BF16, FLOAT32, ROUTERS, error_of, make, rest
from tests.helpers.models import TinyModel, deepspeed_config, gathered, train
from tests.helpers.spawn import RankFailed, run_ranks

pytestmark = pytest.mark.timeout(400)

SAVED_AT = 7  # in the middle of the second window
TIMEOUT_S = 180.0


def assert_goes_on(got: dict[str, Any], want: dict[str, Any], what: object) -> None:
    """Bit for bit."""
    assert got.keys() == want.keys()
    for key in want.keys() - {"weights"}:
        assert got[key] == want[key], (what, key)
    assert got["weights"].keys() == want["weights"].keys()
    assert all(torch.equal(got["weights"][name], weight) for name, weight in want["weights"].items()), what


# The same layout


def scatter_experts(engine: Any) -> None:
    """Carry experts to slots that no rule would have given them: by an exchange, and a move to the last free slot."""
    items = []
    for name, placement in engine.placements().items():
        first, second, *_, last = placement.live_ids
        items.append(Move(layer=name, expert_id=first, to_slot=placement.slot_of(last), exchange_with=last))
        items.append(Move(layer=name, expert_id=second, to_slot=placement.free_slots[-1]))
    engine.apply_plan(Plan(items=tuple(items)))


def there_and_back(rank: int, world_size: int, ep_size: int, folder: str) -> dict[int, dict[str, Any]]:
    found = {}
    for stage in (1, 3):
        engine = make(ep_size, stage)
        train(engine, range(SAVED_AT - 1), rank, world_size)
        before = engine.placements()
        scatter_experts(engine)  # the window is open
        train(engine, range(SAVED_AT - 1, SAVED_AT), rank, world_size)
        torch.manual_seed(50 + rank)
        engine.save_checkpoint(f"{folder}/{stage}")
        saved = engine.placements()
        want = rest(engine, rank, world_size, SAVED_AT) | {"draw": torch.rand(1).item()}
        other = make(ep_size, stage)
        torch.manual_seed(rank)
        train(other, range(20, 22), rank, world_size)  # state of another training must not shine through
        other.load_checkpoint(f"{folder}/{stage}")
        loaded = other.placements()
        got = rest(other, rank, world_size, SAVED_AT) | {"draw": torch.rand(1).item()}
        found[stage] = {"before": before, "saved": saved, "loaded": loaded, "want": want, "got": got}
    return found


@pytest.mark.parametrize(("world_size", "ep_size"), [(1, 1), (2, 1), (4, 2)], ids=["1 rank", "EDP 2", "EP 2 x EDP 2"])
def test_the_same_layout_goes_on_bit_for_bit_with_experts_in_unusual_slots(
    tmp_path: Path, world_size: int, ep_size: int
) -> None:
    found = run_ranks(there_and_back, world_size, ep_size, f"{tmp_path}", timeout_s=TIMEOUT_S)
    for rank, of_rank in enumerate(found):
        for stage, run in of_rank.items():
            assert run["loaded"] == run["saved"], (rank, stage)
            for name, placement in run["saved"].items():
                before = run["before"][name]
                moved = [id_ for id_ in before.live_ids if before.slot_of(id_) != placement.slot_of(id_)]
                assert len(moved) == 3 and placement.num_slots == 8
            assert_goes_on(run["got"], run["want"], (rank, stage))
            assert [event["step"] for event in run["want"]["plans"]] == [8, 12]


# Another layout

# Ranks, ranks per pool, ZeRO stage.
WRITERS = {"1 rank, ZeRO 0": (1, 1, 0), "EP 2, ZeRO 3": (2, 2, 3)}
READERS = {"EP 4, ZeRO 1": (4, 4, 1), "EDP 2, ZeRO 0": (2, 1, 0), "1 rank, ZeRO 2": (1, 1, 2)}


# Two experts are born after step 4, one of few tokens is pruned there and one after step 12. Both shares are far from
# what is measured, since in bf16 a token may choose otherwise.
PLANS = dm.AdaptationConfig(4, 3, prune_below_share=0.7, min_unrouted_share=0.02)
# Whether in bf16, and the step: before anything was adapted, and in the middle of the next window.
SAVED = [(False, 3), (False, 7), (True, 3)]


def planned(ep_size: int, stage: int, bf16: bool) -> Any:
    model = TinyModel(ep_size, num_experts=3)
    return dm.initialize(model, deepspeed_config(stage, bf16=bf16), PLANS)


def plans_by_id(events: list[dict[str, Any]], bf16: bool) -> list[Any]:
    """What is grown and pruned, when, and from which counts: slots and ranks left out, in bf16 the counts, too."""
    told = ("pruned", "live_before", "live_after", "out_of_slots")
    counts = () if bf16 else ("tokens_per_expert", "num_tokens", "num_unrouted", "mean_k")
    return [
        (
            event["step"],
            name,
            [(grown["expert_id"], grown["parent_id"], grown["seeding"]) for grown in layer["grown"]],
            {key: layer[key] for key in (*told, *counts)},
        )
        for event in events
        for name, layer in event["layers"].items()
    ]


def write(rank: int, world_size: int, ep_size: int, stage: int, folder: str) -> dict[bool, dict[str, Any]]:
    found = {}
    for bf16 in (False, True):
        engine, losses = planned(ep_size, stage, bf16), []
        for first, last in ((0, 3), (3, 7)):
            losses += train(engine, range(first, last), rank, world_size)
            engine.save_checkpoint(f"{folder}/{bf16}")
        events = [event.to_dict() for event in engine.take_events()]
        end = rest(engine, rank, world_size, 7)
        found[bf16] = end | {"losses": losses + end["losses"], "plans": events + end["plans"]}
    return found


def read(
    rank: int, world_size: int, ep_size: int, stage: int, folder: str
) -> dict[tuple[str, bool, int], dict[str, Any]]:
    found = {}
    for writer in WRITERS:
        for bf16, step in SAVED:
            engine = planned(ep_size, stage, bf16)
            engine.load_checkpoint(f"{folder}/{writer}/{bf16}", step)
            found[writer, bf16, step] = rest(engine, rank, world_size, step)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[bool, dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("written")
    return folder, {
        name: run_ranks(write, world_size, ep_size, stage, f"{folder}/{name}", timeout_s=TIMEOUT_S)[0]
        for name, (world_size, ep_size, stage) in WRITERS.items()
    }


@pytest.mark.parametrize("reader", READERS)
def test_what_few_ranks_wrote_goes_on_closely_with_the_same_plans(reader: str, written: tuple[Path, Any]) -> None:
    folder, wanted = written
    world_size, ep_size, stage = READERS[reader]
    found = run_ranks(read, world_size, ep_size, stage, f"{folder}", timeout_s=TIMEOUT_S)
    for of_rank in found:
        for what, got in of_rank.items():
            writer, bf16, step = what
            want = wanted[writer][bf16]
            assert got["losses"] == pytest.approx(want["losses"][step:], abs=BF16 if bf16 else FLOAT32), what
            assert got["live"] == want["live"], what
            plans = plans_by_id(want["plans"], bf16)
            assert plans_by_id(got["plans"], bf16) == plans[0 if step == 3 else 2 :], what
            changes = {(at, len(grown), len(told["pruned"])) for at, _, grown, told in plans}
            assert changes >= {(4, 1, 0), (4, 1, 1), (12, 0, 1)}, what
            assert got["slots"] == found[0][what]["slots"], what
            for name, weight in want["weights"].items():
                error = (got["weights"][name] - weight).abs().max().item()
                assert error <= (2e-2 if bf16 else 5e-6), (what, name, error)


# Another dtype


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """What the one checkpoint in `folder` holds, as torch itself reads it."""
    reader = dcp.FileSystemReader(next(folder.glob("step-*")) / "tensors")
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def partly_frozen(stage: int, bf16: bool) -> Any:
    model = TinyModel(2)
    model.first.weight.requires_grad_(False)
    return dm.initialize(model, deepspeed_config(stage, bf16=bf16))


def change_dtype(rank: int, world_size: int, folder: str) -> dict[tuple[int, bool], tuple[list[float], list[float]]]:
    """By stage and whether the writer was bf16: the losses of reader and writer after the checkpoint."""
    found = {}
    for stage in (0, 3):
        for bf16 in (False, True):
            place = f"{folder}/{stage}/{bf16}"
            writer = partly_frozen(stage, bf16)
            train(writer, range(3), rank, world_size)
            writer.save_checkpoint(f"{place}/written")
            want = train(writer, range(3, 7), rank, world_size)
            reader = partly_frozen(stage, not bf16)
            reader.masters.write_frozen(reader.module.first.weight, torch.zeros(16, 16))
            reader.load_checkpoint(f"{place}/written")
            reader.save_checkpoint(f"{place}/again")
            found[stage, bf16] = train(reader, range(3, 7), rank, world_size), want
    return found


def test_another_dtype_reads_the_same_masters_and_goes_on_closely(tmp_path: Path) -> None:
    for of_rank in run_ranks(change_dtype, 2, f"{tmp_path}", timeout_s=TIMEOUT_S):
        for what, (got, want) in of_rank.items():
            # Weights are rounded in one of the two and not in the other: more than between two layouts in bf16.
            assert got == pytest.approx(want, abs=5 * BF16), what
            assert got != want, "both have trained in the same dtype"
    frozen = "first.weight/weight"
    for stage in (0, 3):
        for bf16 in (False, True):
            written, again = (tensors_of(tmp_path / f"{stage}" / f"{bf16}" / name) for name in ("written", "again"))
            assert written.keys() == again.keys() and len(written) > 50
            for name in written.keys() - {frozen}:
                assert written[name].dtype == again[name].dtype == torch.float32, name
                assert torch.equal(written[name], again[name]), (stage, bf16, name)
            # What is not trained has no master: it is in the model's dtype, rounded where that is the coarser one.
            assert written[frozen].any()
            assert torch.equal(again[frozen].float(), written[frozen].bfloat16().float()), (stage, bf16)


# Controllers of routers


# These have losses of each rank's own tokens, which differ between layouts: after an equal start their undisturbed runs
# are up to 1.3e-4 apart in the two steps that follow.
LOSSES_OF_RANKS = ("recommended", "top-p")


def control(
    rank: int, world_size: int, ep_size: int, stage: int, folder: str, loads: bool
) -> dict[str, tuple[Any, list[float], Any]]:
    """By router: observables at the checkpoint, two more losses, observables then."""
    found = {}
    for name, router in ROUTERS.items():
        model = TinyModel(ep_size, num_experts=4, num_slots=6, router=router)
        engine = dm.initialize(model, deepspeed_config(stage))
        place = f"{folder}/{name}"
        if loads:
            engine.load_checkpoint(place)
        else:
            train(engine, range(5), rank, world_size)
            engine.save_checkpoint(place)
        at_first = engine.observables()
        found[name] = at_first, train(engine, range(5, 7), rank, world_size), engine.observables()
    return found


def test_controllers_of_every_router_go_on_on_another_layout(tmp_path: Path) -> None:
    wanted = run_ranks(control, 2, 2, 1, f"{tmp_path}", False, timeout_s=TIMEOUT_S)[0]
    found = run_ranks(control, 1, 1, 0, f"{tmp_path}", True, timeout_s=TIMEOUT_S)[0]
    for name, (at_first, losses, at_last) in wanted.items():
        assert found[name][0] == at_first, name
        assert found[name][1][0] == pytest.approx(losses[0], abs=FLOAT32), name
        tolerance = 3e-4 if name in LOSSES_OF_RANKS else FLOAT32
        assert found[name][1][1] == pytest.approx(losses[1], abs=tolerance), name
        for layer, values in at_last.items():
            # One token of 64 that chooses otherwise is 0.016 in a budget.
            tolerance = 0.04 if name in LOSSES_OF_RANKS else 1e-6
            assert found[name][2][layer] == pytest.approx(values, rel=1e-5, abs=tolerance), (name, layer)
        assert at_first or name == "recommended"
        assert at_first != at_last or not at_first, f"the controllers of {name} stood still"


# Elastic pools

ELASTIC_SAVED_AT, ELASTIC_END = 8, 12  # windows are steps 2 and 3, 5 and 6, 8 and 9, 11 and 12


def elastic(ep_size: int) -> Any:
    """Experts double at steps 3, 6 and 9: 2, 4, 8, 16."""
    adaptation = dm.AdaptationConfig(
        3, 2, rule="split_all", pool="elastic", rebalance_above=1.0, rebalance_cost=0.0, last_growth_step=9
    )
    return dm.initialize(TinyModel(ep_size, num_experts=2, num_slots=4), deepspeed_config(1), adaptation)


def elastic_rest(engine: Any, rank: int, world_size: int) -> dict[str, Any]:
    engine.take_events()
    losses = train(engine, range(ELASTIC_SAVED_AT, ELASTIC_END), rank, world_size)
    events = [event.to_dict() for event in engine.take_events()]
    return {
        "losses": losses,
        "plans": events,
        "slots": {name: placement.expert_ids for name, placement in engine.placements().items()},
        "weights": gathered(engine),
        "norm": engine.gradient_norm(),
    }


def hold_back_writing(until: threading.Event) -> None:
    """From now on this rank begins to write a checkpoint only after `until`."""
    ordinary = store._prepare

    def prepare(aside: Path) -> None:
        assert until.wait(TIMEOUT_S)
        ordinary(aside)

    store._prepare = prepare


def elastic_runs(rank: int, world_size: int, ep_size: int, folder: str) -> dict[str, Any]:
    engine = elastic(ep_size)
    train(engine, range(ELASTIC_SAVED_AT), rank, world_size)
    engine.save_checkpoint(f"{folder}/at once")
    found = {"saved": engine.placements(), "undisturbed": elastic_rest(engine, rank, world_size)}
    engine = elastic(ep_size)
    engine.load_checkpoint(f"{folder}/at once")
    found["resumed"] = elastic_rest(engine, rank, world_size)

    engine = elastic(ep_size)
    engine.load_checkpoint(f"{folder}/at once")
    is_resized = threading.Event()
    hold_back_writing(is_resized)
    path = engine.save_checkpoint(f"{folder}/background", asynchronous=True)
    engine.resize_slots(24)
    train(engine, range(30, 31), rank, world_size)
    found["is written too early"] = path.exists()
    is_resized.set()
    engine.wait_for_checkpoint()
    engine = elastic(ep_size)
    engine.load_checkpoint(f"{folder}/background")
    found["loaded"] = engine.placements()
    found["resized"] = elastic_rest(engine, rank, world_size)
    return found


@pytest.mark.parametrize(("world_size", "ep_size"), [(1, 1), (4, 2)], ids=["1 rank", "EP 2 x EDP 2"])
def test_elastic_pools_go_on_bit_for_bit_also_when_resized_while_a_checkpoint_is_written(
    tmp_path: Path, world_size: int, ep_size: int
) -> None:
    found = run_ranks(elastic_runs, world_size, ep_size, f"{tmp_path}", timeout_s=TIMEOUT_S)
    for of_rank in found:
        assert all(placement.num_slots > 4 for placement in of_rank["saved"].values()), "the pools have not grown"
        assert not of_rank["is written too early"]
        assert of_rank["loaded"] == of_rank["saved"]
        assert_goes_on(of_rank["resumed"], of_rank["undisturbed"], "resumed")
        assert_goes_on(of_rank["resized"], of_rank["undisturbed"], "resized while it was written")
        layers = [layer for event in of_rank["undisturbed"]["plans"] for layer in event["layers"].values()]
        assert any(layer["num_slots"] != layer["num_slots_before"] for layer in layers), "no pool was resized after it"
        assert any(layer["grown"] for layer in layers), "nothing grew after it"
        assert any(layer["moved"] for layer in layers) == (world_size > 1)
    written, again = (tensors_of(tmp_path / name) for name in ("at once", "background"))
    assert written.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in written.items())


# Damage


def make_one(rank: int, world_size: int, folder: str) -> None:
    engine = make(2, 2)
    train(engine, range(2), rank, world_size)
    engine.save_checkpoint(folder)


def try_each(rank: int, world_size: int, folder: str, names: list[str]) -> list[str]:
    engine = make(2, 2)
    return [error_of(lambda name=name: engine.load_checkpoint(f"{folder}/{name}")) for name in names]


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cut off": ("shared.pt", _cut_off),
    "no metadata": ("tensors/.metadata", Path.unlink),
    "no first rank": ("rank_00000.pt", Path.unlink),
    "no last rank": ("rank_00003.pt", Path.unlink),
}


def test_damage_is_an_error_on_each_of_four_ranks_and_of_fewer_ones(tmp_path: Path) -> None:
    run_ranks(make_one, 4, f"{tmp_path}/whole", timeout_s=TIMEOUT_S)
    for how, (file, damage) in DAMAGES.items():
        shutil.copytree(tmp_path / "whole", tmp_path / how)
        damage(tmp_path / how / "step-00000002" / file)
    for world_size in (4, 2):
        for errors in run_ranks(try_each, world_size, f"{tmp_path}", [*DAMAGES, "whole"], timeout_s=60):
            *of_damages, of_whole = errors
            assert of_whole == "no error", "the ranks are out of step after the errors"
            for error, (file, _) in zip(of_damages, DAMAGES.values(), strict=True):
                assert error.startswith(("CheckpointError", "DivergenceError: Another rank failed")), error
                assert f"step-00000002/{file} " in error, error
                assert ("it was cut off" if file == "shared.pt" else "No such file") in error, error


# Killed while a checkpoint is written in the background


def be_killed(rank: int, world_size: int, folder: str, function: str, victim: int) -> None:
    engine = killed.make(rank, world_size)
    train(engine, range(2), rank, world_size)
    engine.save_checkpoint(folder)
    train(engine, range(2, 4), rank, world_size)

    def die(*args: Any, **kwargs: Any) -> Any:
        if rank == victim:
            assert threading.current_thread() is not threading.main_thread()
            os.kill(os.getpid(), signal.SIGKILL)
        return ordinary(*args, **kwargs)

    ordinary = getattr(store, function)
    setattr(store, function, die)
    engine.save_checkpoint(folder, asynchronous=True)
    train(engine, range(4, 6), rank, world_size)
    engine.wait_for_checkpoint()


def go_on(rank: int, world_size: int, folder: str) -> tuple[int, list[float], list[float]]:
    first, losses = killed.go_on(rank, world_size, folder)
    return first, losses, killed.undisturbed(rank, world_size)


@pytest.mark.parametrize(
    ("function", "victim"),
    [("_save", 3), ("publish", 0)],
    ids=["before a rank's own file", "before the rename"],
)
def test_a_rank_of_four_killed_in_the_background_leaves_the_checkpoint_before_whole(
    tmp_path: Path, function: str, victim: int
) -> None:
    with pytest.raises(RankFailed):
        run_ranks(be_killed, 4, f"{tmp_path}", function, victim, timeout_s=60)
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert not (tmp_path / "step-00000004").exists()
    for first, losses, want in run_ranks(go_on, 4, f"{tmp_path}", timeout_s=TIMEOUT_S):
        assert first == 2 and losses == want[2:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000006"], "leftovers stay"


# Records of a training that is over


def save_after_loading(rank: int, world_size: int, folder: str) -> list[Any]:
    """The loads that checkpoints name which are written right after a load: by an engine of another training."""
    found = []
    for num_experts in (3, 5):
        engine = make(1, 0, num_experts=num_experts)
        train(engine, range(2), rank, world_size)
        engine.save_checkpoint(f"{folder}/{num_experts}")
        loaded = make(1, 0, num_experts=5)
        train(loaded, range(10, 12), rank, world_size)
        loaded.load_checkpoint(f"{folder}/{num_experts}")
        found.append((loaded.last_loads(), engine.last_loads()))
    return found


def test_the_last_step_of_the_training_before_a_load_is_forgotten(tmp_path: Path) -> None:
    for got, want in run_ranks(save_after_loading, 1, f"{tmp_path}", timeout_s=TIMEOUT_S)[0]:
        assert got in ({}, want)
