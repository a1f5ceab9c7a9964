"""What goes wrong on one rank while a checkpoint is written or read, and what must not survive a load."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Move, Plan, Prune
from dynmoe_ds.checkpoint import store
from dynmoe_ds.errors import CheckpointError, DivergenceError
from tests.helpers.models import TinyModel, deepspeed_config, train
from tests.helpers.spawn import run_ranks


def make(stage: int = 1, *, num_slots: int = 8, adaptation: Any = None, **options: Any) -> Any:
    router = options.pop("router", "top_any")
    return dm.initialize(
        TinyModel(2, num_experts=3, num_slots=num_slots, router=router), deepspeed_config(stage, **options), adaptation
    )


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (CheckpointError, DivergenceError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def failing_on(rank: int, victim: int, owner: Any, name: str) -> Callable[[], None]:
    """Let a function fail on one rank, as a disk does; gives what undoes it."""
    ordinary = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    if rank == victim:
        setattr(owner, name, fail)
    return lambda: setattr(owner, name, ordinary)


def one_sided(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    engine = make()
    train(engine, range(2), rank, world_size)
    engine.save_checkpoint(folder)
    train(engine, range(2, 3), rank, world_size)
    found: dict[str, Any] = {}
    undo = failing_on(rank, 1, store, "flush")
    found["save"] = error_of(lambda: engine.save_checkpoint(folder))
    found["background"] = error_of(
        lambda: (engine.save_checkpoint(folder, asynchronous=True), engine.wait_for_checkpoint())
    )
    engine.save_checkpoint(folder, asynchronous=True)  # nobody asks how it went
    while not engine._writer._pending.done():
        time.sleep(0.01)
    undo()
    # The failure before is no reason not to write this one, nor not to load one.
    found["path"] = engine.save_checkpoint(folder).name
    undo = failing_on(rank, 1, torch, "load")
    found["load"] = error_of(lambda: engine.load_checkpoint(folder))
    undo()
    found["loaded"] = engine.load_checkpoint(folder, 2)[0].name
    return found


def test_what_fails_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    for found in run_ranks(one_sided, 2, f"{tmp_path}", timeout_s=60):
        for key in ("save", "background"):
            assert "step-00000003 cannot be written: Stale file handle. Nothing is left of it." in found[key], found
        assert "Stale file handle" in found["load"]
        assert (found["path"], found["loaded"]) == ("step-00000003", "step-00000002")


def subsets(rank: int, world_size: int, folder: str) -> dict[str, str]:
    model = TinyModel(2, num_experts=3)
    model.extra = nn.Linear(2, 2)
    larger = dm.initialize(model, deepspeed_config(1))
    larger.save_checkpoint(f"{folder}/larger")
    make(router="relu").save_checkpoint(f"{folder}/relu")
    engine = make()
    losses = train(engine, range(2), rank, world_size)
    found = {
        name: error_of(lambda name=name: engine.load_checkpoint(f"{folder}/{name}")) for name in ("larger", "relu")
    }
    # Nothing was changed by the attempts.
    rest = train(engine, range(2, 4), rank, world_size)
    found["same"] = f"{losses + rest == train(make(), range(4), rank, world_size)}"
    return found


def test_a_checkpoint_with_more_in_it_or_with_other_routers_is_refused(tmp_path: Path) -> None:
    for found in run_ranks(subsets, 2, f"{tmp_path}"):
        assert "it has extra.bias/weight and 1 more, for which there is no place here" in found["larger"]
        assert "the router of moe.0 is ReluConfig there, but TopAnyConfig here" in found["relu"]
        assert found["same"] == "True"


def of_one_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """What needs no second rank, one after another."""
    found: dict[str, Any] = {}
    engine = dm.initialize(TinyModel(1, num_experts=3), deepspeed_config(1))
    train(engine, range(2), rank, world_size)
    odd = {"epochs": [1, {"best": np.float64(2)}]}
    found["odd state"] = error_of(lambda: engine.save_checkpoint(folder, odd))
    state = {"epoch": 3}
    engine.save_checkpoint(folder, state, asynchronous=True)
    state["epoch"] = 99
    engine.wait_for_checkpoint()
    found["state"] = engine.load_checkpoint(folder)[1]

    model = TinyModel(1, num_experts=3)
    config = deepspeed_config(0)
    del config["optimizer"]
    engine = dm.initialize(model, config, optimizer=torch.optim.NAdam(model.parameters(), lr=1e-3))
    train(engine, range(1), rank, world_size)
    found["nadam"] = [error_of(lambda: engine.save_checkpoint(folder)), error_of(lambda: engine.resize_slots(12))]

    # Three groups with their own rates, one after another loaded at the other kind of stage.
    found["rates"] = []
    for stage in (2, 3):
        model = TinyModel(1, num_experts=3)
        moe = [p for name, p in model.named_parameters() if name.startswith("moe.0.")]
        rest = [p for name, p in model.named_parameters() if not name.startswith("moe.0.")]
        config = deepspeed_config(stage)
        groups = [{"params": moe, "lr": 1e-4}, {"params": rest, "lr": 1e-3}]
        engine = dm.initialize(model, config, model_parameters=groups)
        if stage == 2:
            train(engine, range(1), rank, world_size)
            for group in engine.optimizer.param_groups:
                group["lr"] *= 0.5
            engine.save_checkpoint(f"{folder}/rates")
        else:
            engine.load_checkpoint(f"{folder}/rates")
        found["rates"].append(sorted({round(group["lr"], 8) for group in engine.optimizer.param_groups}))

    found["schedules"] = []
    for stage in (1, 3):
        model = TinyModel(1, num_experts=3)
        config = deepspeed_config(stage)
        del config["optimizer"]
        groups = [{"params": model.first.parameters(), "lr": 1e-2}, {"params": model.moe.parameters(), "lr": 1e-3}]
        optimizer = torch.optim.AdamW(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        engine = dm.initialize(model, config, optimizer=optimizer, lr_scheduler=scheduler)
        train(engine, range(2), rank, world_size)
        engine.resize_slots(12)
        train(engine, range(2, 3), rank, world_size)
        found["schedules"].append(sorted({group["lr"] for group in engine.optimizer.param_groups}))
    return found


def test_states_optimisers_rates_and_schedules(tmp_path: Path) -> None:
    (found,) = run_ranks(of_one_rank, 1, f"{tmp_path}", timeout_s=90)
    assert "client_state['epochs'][1]['best'] is a numpy.float64" in found["odd state"]
    assert found["state"] == {"epoch": 3}
    for error in found["nadam"]:
        assert "NAdam keeps mu_product, which is not one number per weight" in error
    assert found["rates"] == [[5e-5, 5e-4], [5e-5, 5e-4]]
    assert found["schedules"] == [[0.125e-3, 0.125e-2]] * 2


def loads(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    engine = make(adaptation=dm.AdaptationConfig(100, 50))
    train(engine, range(2), rank, world_size)
    found["before"] = engine.last_loads()["moe.0"]
    engine.save_checkpoint(folder)
    train(engine, range(5, 7), rank, world_size)
    engine.load_checkpoint(folder)
    found["after a load"] = engine.last_loads()["moe.0"]
    engine.resize_slots(12)
    found["after a resize"] = engine.last_loads()["moe.0"]
    train(engine, range(2, 3), rank, world_size)
    found["last"] = engine.last_loads()["moe.0"]
    first, third, second = sorted(found["last"], key=found["last"].__getitem__)
    slot = engine.placements()["moe.0"].slot_of(second)
    exchange = Move(layer="moe.0", expert_id=first, to_slot=slot, exchange_with=second)
    engine.apply_plan(Plan(items=(exchange, Prune(layer="moe.0", expert_id=third))))
    found["after an exchange"] = engine.last_loads()["moe.0"]
    engine.resize_slots(4)
    found["after both"] = engine.last_loads()["moe.0"]
    closed, now = engine.take_records_by_placement()
    placements, records = closed
    slots = placements["moe.0"].slots_by_id
    found["taken"] = {id_: int(records["moe.0"].tokens_per_slot[slot]) for id_, slot in slots.items()}
    found["sum"] = int(records["moe.0"].num_assignments), int(now[1]["moe.0"].num_assignments)
    return found


def test_loads_follow_experts_through_loads_resizes_and_plans(tmp_path: Path) -> None:
    for found in run_ranks(loads, 2, f"{tmp_path}"):
        assert found["before"] == found["after a load"] == found["after a resize"] and sum(found["before"].values()) > 0
        assert len(set(found["last"].values())) > 1, "the loads do not tell the experts apart"
        assert found["last"] == found["after an exchange"] == found["after both"]
        # What was counted before the plan is given under the placements from before it, the pruned expert included.
        assert len(found["taken"]) == 3 and sum(found["taken"].values()) == found["sum"][0] > 0
        assert found["sum"][1] == 0


def left_out(rank: int, world_size: int, folder: str) -> int:
    engine = dm.initialize(TinyModel(1, num_experts=3), deepspeed_config(1), on_non_finite="skip_step")
    train(engine, range(1), rank, world_size)
    engine.save_checkpoint(folder)
    for _ in range(10):
        engine.backward(engine(torch.full((4, 16), torch.nan), torch.zeros(4, 16)))
        engine.step()
    engine.load_checkpoint(folder)
    engine.backward(engine(torch.full((4, 16), torch.nan), torch.zeros(4, 16)))
    engine.step()  # the eleventh in a row, but the first since the checkpoint
    return int(engine.skipped_steps)


def test_updates_left_out_before_a_load_do_not_count(tmp_path: Path) -> None:
    assert run_ranks(left_out, 1, f"{tmp_path}") == [1]


def test_one_that_was_about_to_be_replaced_counts_until_the_other_is_there(tmp_path: Path) -> None:
    for name in ("step-00000002", ".step-00000004.replaced", ".step-00000002.replaced", ".step-00000006.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    found = store.list_checkpoints(tmp_path)
    assert {step: path.name for step, path in found.items()} == {2: "step-00000002", 4: ".step-00000004.replaced"}
    store.remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-00000004.replaced", "step-00000002"]


def note_fails(rank: int, world_size: int, folder: str) -> str:
    engine = dm.initialize(TinyModel(1, num_experts=3), deepspeed_config(1))
    (Path(folder) / "latest").mkdir(parents=True)
    (Path(folder) / "latest" / "in_the_way").touch()
    return error_of(lambda: engine.save_checkpoint(folder))


def test_a_checkpoint_that_is_there_but_not_noted_is_told_so(tmp_path: Path) -> None:
    (error,) = run_ranks(note_fails, 1, f"{tmp_path}")
    assert "step-00000000 is written, but" in error and "latest cannot be" in error
    assert list(store.list_checkpoints(tmp_path)) == [0]


@pytest.mark.parametrize("method", ["load_state_dict", "load_module_state_dict", "load_moe_state_dict"])
def test_deepspeeds_loads_are_refused(method: str) -> None:
    (error,) = run_ranks(native, 1, method)
    assert f"engine.{method} is DeepSpeed's own" in error


def native(rank: int, world_size: int, method: str) -> str:
    engine = dm.initialize(TinyModel(1, num_experts=3), deepspeed_config(1))
    return error_of(lambda: getattr(engine, method)({}))
