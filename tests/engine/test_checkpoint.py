"""Training goes on from a checkpoint as if nothing had happened, on the same layout bit for bit, on others closely."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dynmoe_ds as dm
from dynmoe_ds.engine.snapshot import take_snapshot
from dynmoe_ds.errors import CheckpointError, DivergenceError
from dynmoe_ds.routing import BudgetConfig
from tests.helpers.models import TinyModel, batch, deepspeed_config, gathered, shard, train
from tests.helpers.spawn import run_ranks

STAGES = (0, 1, 2, 3)
ADAPTATION = dm.AdaptationConfig(4, 3)  # windows are steps 2 to 4, 6 to 8 and 10 to 12
# Which of two experts is nearer to a new one may depend on the last bit of a weight in bf16; their mean does not.
BF16_ADAPTATION = dm.AdaptationConfig(4, 3, seeding="mean")
SAVED_AT = (3, 4, 7)  # in the middle of a window, right after an adaptation, in the middle of the next window
END = 12
FLOAT32 = 5e-6
BF16 = 2e-3  # losses near 1, of weights that are rounded in another order


def make(ep_size: int, stage: int, *, bf16: bool = False, num_slots: int = 8, **options: Any) -> Any:
    router = options.pop("router", "top_any")
    model = TinyModel(ep_size, num_experts=options.pop("num_experts", 3), num_slots=num_slots, router=router)
    return dm.initialize(model, deepspeed_config(stage, bf16=bf16, **options), BF16_ADAPTATION if bf16 else ADAPTATION)


def rest(engine: Any, rank: int, world_size: int, first: int) -> dict[str, Any]:
    """What training does from step `first` to the end."""
    losses = train(engine, range(first, END), rank, world_size)
    events = [event.to_dict() for event in engine.take_events() if event.step > first]
    return {
        "losses": losses,
        "plans": events,
        "live": {name: placement.live_ids for name, placement in engine.placements().items()},
        "slots": {name: placement.expert_ids for name, placement in engine.placements().items()},
        "weights": gathered(engine),
        "norm": engine.gradient_norm(),
    }


def save_on_the_way(
    rank: int, world_size: int, ep_size: int, folder: str, stages: tuple[int, ...], bf16: bool
) -> dict[Any, Any]:
    found = {}
    for stage in stages:
        engine, done = make(ep_size, stage, bf16=bf16), 0
        losses: list[float] = []
        for step in SAVED_AT:
            losses += train(engine, range(done, step), rank, world_size)
            done = step
            engine.save_checkpoint(f"{folder}/{stage}", {"rank": rank, "step": step})
        found[stage] = rest(engine, rank, world_size, done)
        found[stage]["all losses"] = losses + found[stage]["losses"]
    return found


def load_each(
    rank: int, world_size: int, ep_size: int, folder: str, stages: tuple[int, ...], bf16: bool
) -> dict[Any, Any]:
    found = {}
    for stage in stages:
        for step in SAVED_AT:
            torch.manual_seed(rank)
            engine = make(ep_size, stage, bf16=bf16)
            train(engine, range(20, 22), rank, world_size)  # state of another training must not shine through
            path, client_state = engine.load_checkpoint(f"{folder}/{stage}", step)
            assert (path.name, client_state) == (f"step-{step:08d}", {"rank": rank, "step": step})
            assert engine.global_steps == step
            found[stage, step] = rest(engine, rank, world_size, step)
    return found


def assert_same(got: dict[str, Any], want: dict[str, Any], what: object) -> None:
    """Bit for bit, from where `got` begins."""
    first = len(want["all losses"]) - len(got["losses"])
    assert got["losses"] == want["all losses"][first:], what
    assert got["slots"] == want["slots"] and got["norm"] == want["norm"], what
    assert got["plans"][-len(want["plans"]) :] == want["plans"], what
    assert all(torch.equal(got["weights"][name], weight) for name, weight in want["weights"].items()), what


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.timeout(400)
def test_the_same_layout_goes_on_bit_for_bit(tmp_path: Path, bf16: bool) -> None:
    want = run_ranks(save_on_the_way, 2, 2, f"{tmp_path}", STAGES, bf16, timeout_s=180)
    got = run_ranks(load_each, 2, 2, f"{tmp_path}", STAGES, bf16, timeout_s=180)
    for rank in (0, 1):
        for stage in STAGES:
            assert len(want[rank][stage]["plans"]) == 2, "adaptations after the last checkpoint"
            assert all(len(ids) > 3 for ids in want[rank][stage]["live"].values()), "nothing grew"
            for step in SAVED_AT:
                assert_same(got[rank][stage, step], want[rank][stage], (rank, stage, step))


def undisturbed(rank: int, world_size: int, ep_size: int, bf16: bool) -> list[float]:
    return train(make(ep_size, 2, bf16=bf16), range(END), rank, world_size)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    saved = run_ranks(save_on_the_way, 2, 2, f"{tmp_path}", (2,), False, timeout_s=120)[0]
    assert saved[2]["all losses"] == run_ranks(undisturbed, 2, 2, False)[0]


def load_on(
    rank: int, world_size: int, ep_size: int, folder: str, stage: int, bf16: bool, num_slots: int, step: int
) -> dict[str, Any]:
    engine = make(ep_size, stage, bf16=bf16, num_slots=num_slots)
    _, client_state = engine.load_checkpoint(folder, step)
    return rest(engine, rank, world_size, step) | {"client_state": client_state}


# Ranks, ranks per pool, ZeRO stage, slots.
LAYOUTS = {
    "1 rank": (1, 1, 0, 8),
    "EDP 2, ZeRO 3": (2, 1, 3, 8),
    "EP 2, ZeRO 1, larger pool": (2, 2, 1, 12),
    "EP 4, ZeRO 2": (4, 4, 2, 8),
    "EP 2 x EDP 2, ZeRO 3, another pool": (4, 2, 3, 10),
}


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "bf16"])
def saved_on_four(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Path, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    want = run_ranks(save_on_the_way, 4, 2, f"{folder}", (2,), request.param, timeout_s=120)[0][2]
    return request.param, folder / "2", want


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_goes_on_closely(layout: str, saved_on_four: tuple[bool, Path, Any]) -> None:
    bf16, folder, want = saved_on_four
    world_size, ep_size, stage, num_slots = LAYOUTS[layout]
    tolerance = BF16 if bf16 else FLOAT32
    for step in (3, 7):  # both in the middle of a window: records of four ranks go on as those of others
        got = run_ranks(load_on, world_size, ep_size, f"{folder}", stage, bf16, num_slots, step, timeout_s=120)
        for of_rank in got:
            assert of_rank["losses"] == pytest.approx(want["all losses"][step:], abs=tolerance)
            assert of_rank["live"] == want["live"]
            assert of_rank["slots"] == got[0]["slots"]
            for name, weight in want["weights"].items():
                error = (of_rank["weights"][name] - weight).abs().max().item()
                assert error <= (2e-2 if bf16 else 5e-6), (name, error)
        same_ranks = world_size == 4
        assert [of_rank["client_state"]["rank"] for of_rank in got] == (
            [0, 1, 2, 3] if same_ranks else [0] * world_size
        )


ROUTERS: dict[str, Any] = {
    "budget and bias": dm.TopAnyConfig(budget=BudgetConfig(target_k=1.5, warmup_steps=20), bias_update_speed=0.01),
    "recommended": "top_any_recommended",
    "relu": "relu_budget",
    "top-p": dm.TopPConfig(budget=BudgetConfig(target_k=1.7), num_null_experts=2),
    "expert threshold": "expert_threshold",
}


def controllers(rank: int, world_size: int, folder: str, loads: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, router in ROUTERS.items():
        model = TinyModel(2, num_experts=4, num_slots=6, router=router)
        engine = dm.initialize(model, deepspeed_config(1))
        place = f"{folder}/{name.replace(' ', '_')}"
        if loads:
            engine.load_checkpoint(place)
        else:
            train(engine, range(5), rank, world_size)
            engine.save_checkpoint(place)
        found[name] = (train(engine, range(5, 9), rank, world_size), engine.observables())
    return found


def test_controllers_of_every_router_go_on(tmp_path: Path) -> None:
    want = run_ranks(controllers, 2, f"{tmp_path}", False)[0]
    got = run_ranks(controllers, 2, f"{tmp_path}", True)[0]
    assert got == want
    assert all(values for name, (_, values) in want.items() if name != "recommended")


def in_the_background(rank: int, world_size: int, folder: str) -> tuple[list[float], list[float]]:
    engine = make(2, 2)
    train(engine, range(3), rank, world_size)
    engine.save_checkpoint(folder, asynchronous=True)
    want = train(engine, range(3, 6), rank, world_size)  # while it is being written
    engine.wait_for_checkpoint()
    engine.load_checkpoint(folder)
    return train(engine, range(3, 6), rank, world_size), want


def test_what_is_written_in_the_background_is_the_state_at_the_call(tmp_path: Path) -> None:
    got, want = run_ranks(in_the_background, 2, f"{tmp_path}")[0]
    assert got == want


def scheduled(rank: int, world_size: int, folder: str) -> tuple[Any, Any]:
    def engine() -> Any:
        config = deepspeed_config(1) | {
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_max_lr": 1e-2}}
        }
        return dm.initialize(TinyModel(1), config)

    first = engine()
    train(first, range(4), rank, world_size)
    torch.manual_seed(5)
    np.random.seed(6)
    random.seed(7)
    first.save_checkpoint(folder)
    draws = [torch.rand(2).tolist(), np.random.rand(), random.random()]
    want = [train(first, range(4, 7), rank, world_size), first.get_lr(), draws]
    second = engine()
    second.load_checkpoint(folder)
    draws = [torch.rand(2).tolist(), np.random.rand(), random.random()]
    got = [train(second, range(4, 7), rank, world_size), second.get_lr(), draws]
    assert (second.global_steps, second.micro_steps) == (first.global_steps, first.micro_steps)
    return got, want


def test_scheduler_and_random_numbers_go_on(tmp_path: Path) -> None:
    got, want = run_ranks(scheduled, 1, f"{tmp_path}")[0]
    assert got == want
    assert want[1][0] < 1e-2, "the schedule has not ended"


def frozen(rank: int, world_size: int, folder: str, stage: int, loads: bool) -> list[float]:
    model = TinyModel(1)
    model.first.weight.requires_grad_(False)
    if loads:
        with torch.no_grad():
            model.first.weight.zero_()
    engine = dm.initialize(model, deepspeed_config(stage))
    if loads:
        engine.load_checkpoint(folder)
    else:
        train(engine, range(2), rank, world_size)
        engine.save_checkpoint(folder)
    return train(engine, range(2, 5), rank, world_size)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_are_in_it(tmp_path: Path, stage: int) -> None:
    want = run_ranks(frozen, 2, f"{tmp_path}", stage, False)[0]
    assert run_ranks(frozen, 2, f"{tmp_path}", stage, True)[0] == want


def before_the_first_step(rank: int, world_size: int, folder: str) -> tuple[list[float], list[float]]:
    engine = make(2, 2)
    engine.save_checkpoint(folder)
    want = train(engine, range(4), rank, world_size)
    engine.load_checkpoint(folder)
    return train(engine, range(4), rank, world_size), want


def test_a_checkpoint_of_no_step_has_no_moments(tmp_path: Path) -> None:
    got, want = run_ranks(before_the_first_step, 2, f"{tmp_path}")[0]
    assert got == want


def all_that_is_noted(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """What an engine knows besides its weights, in the one that wrote a checkpoint and in one that read it."""

    def known(engine: Any) -> list[Any]:
        seeds = [layer.seed for layer in engine.layers.values()]
        lives = [engine.adaptation.lives.of(name) for name in engine.layers]
        return [
            seeds,
            lives,
            engine.last_loads(),
            engine.adaptation.layers_known_full,
            engine.get_lr(),
            engine.global_steps,
        ]

    first = make(1, 2)
    train(first, range(4), rank, world_size)  # with an adaptation, of which nobody has taken notice
    first.set_lr(3e-3)
    first.adaptation.layers_known_full = {"moe.1"}
    first.save_checkpoint(folder)
    want = known(first)
    second = make(1, 2)
    for layer in second.layers.values():
        layer.seed = 5
    second.load_checkpoint(folder)
    got = known(second)
    tensors = take_snapshot(first, None).tensors
    train(first, range(4, 5), rank, world_size)
    first.load_checkpoint(folder)
    return {
        "want": want,
        "got": got,
        "again": [known(first) == want, first.take_events(), first.gradient_norm()],
        "sizes": {name: tensor.numel() for name, tensor in tensors.items()},
    }


def test_what_is_noted_goes_on_and_replicas_share_the_writing(tmp_path: Path) -> None:
    found = run_ranks(all_that_is_noted, 2, f"{tmp_path}")
    for of_rank in found:
        assert of_rank["got"] == of_rank["want"]
        assert of_rank["again"] == [True, [], None], "something is left of the step after the checkpoint"
    seeds, lives, *_ = found[0]["want"]
    assert seeds == [100, 101] and any(life["born"] == 4 for life in lives[0].values())
    first, second = (of_rank["sizes"] for of_rank in found)
    assert not first.keys() & second.keys()
    assert 0.5 < sum(first.values()) / sum(second.values()) < 2


# Errors


def error_of(action: Any) -> str:
    try:
        action()
    except (CheckpointError, DivergenceError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def make_one(rank: int, world_size: int, folder: str) -> None:
    engine = make(2, 2, num_experts=5)
    train(engine, range(2), rank, world_size)
    engine.save_checkpoint(folder)


def try_to_load(rank: int, world_size: int, folder: str, options: dict[str, Any]) -> str:
    return error_of(lambda: make(2, 2, **options).load_checkpoint(folder))


def damage(folder: Path, how: str) -> None:
    path = folder / "step-00000002"
    file = next((path / "tensors").glob("__1_*"))
    if how == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "changed":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        (path / "rank_00001.pt").unlink()
    elif how == "newer":
        manifest = path / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    elif how == "manifest":
        (path / "manifest.json").write_text("{")
    elif how == "no manifest":
        (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("how", "options", "words"),
    [
        ("cut off", {}, ("tensors/__1_", "it was cut off")),
        ("changed", {}, ("tensors/__1_", "its checksum differs")),
        ("missing", {}, ("rank_00001.pt cannot be read", "No such file")),
        ("newer", {}, ("manifest.json has format version 2", "reads version 1")),
        ("manifest", {}, ("manifest.json is damaged or was cut off",)),
        ("no manifest", {}, ("has no checkpoint",)),
        ("", {"num_slots": 4}, ("has 5 experts in moe.0, but its pool has 4 slots", "num_slots 5 or more")),
        ("", {"kind": "SGD", "momentum": 0.9}, ("holds the state of AdamW", "optimiser is SGD")),
    ],
)
def test_what_cannot_be_loaded_is_an_error_on_every_rank(
    tmp_path: Path, how: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    run_ranks(make_one, 2, f"{tmp_path}")
    damage(tmp_path, how)
    for error in run_ranks(try_to_load, 2, f"{tmp_path}", options):
        assert error.startswith(("CheckpointError", "DivergenceError: Another rank failed")), error
        assert all(word in error for word in words), error


def other_model(rank: int, world_size: int, folder: str) -> list[str]:
    narrow = TinyModel(2, num_experts=3, num_slots=8)
    narrow.last = torch.nn.Linear(16, 12)
    renamed = TinyModel(2, num_experts=3, num_slots=8)
    renamed.extra = torch.nn.Linear(2, 2)
    fewer = TinyModel(2, num_experts=3, num_slots=8)
    fewer.moe = fewer.moe[:1]
    return [
        error_of(lambda m=m: dm.initialize(m, deepspeed_config(2)).load_checkpoint(folder))
        for m in (narrow, renamed, fewer)
    ]


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(make_one, 2, f"{tmp_path}")
    for narrow, renamed, fewer in run_ranks(other_model, 2, f"{tmp_path}"):
        assert "is of another model: last.weight/weight has shape [16, 16] there, but [12, 16] here" in narrow
        assert "has no extra.weight/weight" in renamed
        assert "its MoE layers are moe.0, moe.1, but here they are moe.0" in fewer


def too_large(rank: int, world_size: int, folder: str) -> tuple[str, list[str], str, list[float], list[float]]:
    import resource

    engine = make(2, 2)
    train(engine, range(2), rank, world_size)
    engine.save_checkpoint(folder)
    losses = train(engine, range(2, 4), rank, world_size)
    if rank == 1:  # as if its disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    error = error_of(lambda: engine.save_checkpoint(folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    names = sorted(path.name for path in Path(folder).iterdir())
    losses += train(engine, range(4, 5), rank, world_size)
    engine.save_checkpoint(folder)
    latest = (Path(folder) / "latest").read_text()
    return error, names, latest, losses, undisturbed_losses(rank, world_size)


def undisturbed_losses(rank: int, world_size: int) -> list[float]:
    return train(make(2, 2), range(5), rank, world_size)[2:]


def test_a_full_disk_leaves_the_last_checkpoint_and_the_training(tmp_path: Path) -> None:
    for error, names, latest, losses, want in run_ranks(too_large, 2, f"{tmp_path}"):
        assert ("File too large" in error) and "step-00000004" in error, error
        assert error.startswith("CheckpointError: The checkpoint"), error
        assert names == ["latest", "step-00000002"], "something is left of it"
        assert losses == want
        assert latest == "step-00000005\n"


def at_a_wrong_time(rank: int, world_size: int, folder: str) -> list[str]:
    engine = make(1, 1, accumulate=2)
    x, y = shard(batch(0, 8), rank, world_size)
    loss = engine(x, y)
    errors = [error_of(lambda: engine.save_checkpoint(folder))]
    engine.backward(loss)
    engine.step()
    errors.append(error_of(lambda: engine.save_checkpoint(folder)))
    errors.append(error_of(lambda: engine.load_checkpoint(folder)))
    for method in ("save_16bit_model", "load_universal_checkpoint"):
        errors.append(error_of(lambda method=method: getattr(engine, method)(folder)))
    return errors


def test_in_the_middle_of_a_step_and_by_deepspeeds_own_methods_it_is_refused(tmp_path: Path) -> None:
    *middle, half, universal = run_ranks(at_a_wrong_time, 1, f"{tmp_path}")[0]
    assert all("in the middle of an optimiser step" in error for error in middle), middle
    assert "engine.save_16bit_model is DeepSpeed's own" in half and "Use engine.save_checkpoint" in universal
