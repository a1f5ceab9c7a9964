"""Which Adam a run gets; and apex's, which counts elsewhere, goes on through growth, resizing and checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.engine import adam as adam_module
from dynmoe_ds.engine.adam import apex_adam, choose_adam, optimizer_faults
from dynmoe_ds.errors import ConfigError
from tests.helpers.fake_apex import importable_apex, write_fake_apex
from tests.helpers.models import TinyModel, deepspeed_config, train
from tests.helpers.spawn import run_ranks


@pytest.fixture
def fake_apex(tmp_path: Path) -> Iterator[Path]:
    with importable_apex(tmp_path):
        yield tmp_path


def _settings(kind: str = "AdamW", **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 0.1, **params}}}


def _chosen(adam: Any, **params: Any) -> Any:
    """`apex`, or what DeepSpeed is told."""
    settings = _settings(**params)
    make = choose_adam(settings, adam)
    return "apex" if make is not None else {k: v for k, v in settings["optimizer"]["params"].items() if k != "lr"}


TORCH = {"torch_adam": True, "fused": True}


def test_on_a_cpu_adam_is_torchs(fake_apex: Path) -> None:
    assert [_chosen(adam) for adam in ("auto", "torch", None)] == [TORCH] * 3
    assert _chosen("auto", foreach=True) == {"torch_adam": True, "foreach": True}


def test_on_a_gpu_auto_takes_apex_where_it_can_be_used(fake_apex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_module, "runs_on_gpu", lambda: True)
    assert [_chosen(adam) for adam in ("auto", "apex")] == ["apex", "apex"]
    assert _chosen("torch") == TORCH
    assert _chosen("deepspeed_fused") == {"torch_adam": False}
    assert _chosen(None) == {}, "as DeepSpeed does"
    (fake_apex / "amp_C.py").unlink()  # the compiled extension
    sys.modules.pop("amp_C", None)
    assert _chosen("auto") == TORCH


def test_apex_is_not_for_zero3(fake_apex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count a step per part of a group: losses of the model below were off by up to 0.009 in eight steps."""
    monkeypatch.setattr(adam_module, "runs_on_gpu", lambda: True)
    settings = _settings() | {"zero_optimization": {"stage": 3}}
    assert choose_adam(settings, "auto") is None and settings["optimizer"]["params"]["torch_adam"]
    with pytest.raises(ConfigError, match=r"^adam is apex, which counts steps wrongly at ZeRO-3"):
        choose_adam(settings, "apex")
    made = apex_adam(_settings()["optimizer"])([torch.nn.Parameter(torch.ones(1))])
    assert optimizer_faults(made, None, 2) == []
    (fault,) = optimizer_faults(made, None, 3)
    assert fault.startswith("The optimizer is apex's FusedAdam, which counts steps wrongly at ZeRO-3")


def _refusal(adam: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        choose_adam(_settings(**settings), adam)
    return str(caught.value)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for adam in ("deepspeed_fused", "apex"):
        assert (
            _refusal(adam)
            == f"adam is {adam} but its kernels are for GPUs, and this run is on CPUs. Use auto or torch."
        )
    assert _refusal("torch", kind="SGD").startswith(
        "adam is torch but the optimiser of DeepSpeed's configuration is 'SGD'"
    )
    assert _refusal("fast") == "adam is 'fast'. Use auto, torch, deepspeed_fused, apex."
    assert choose_adam(_settings("SGD"), None) is None and choose_adam({}, None) is None
    with pytest.raises(ConfigError, match=r"^apex's FusedAdam has no amsgrad\. Leave it out, or use adam=torch\."):
        apex_adam(_settings(amsgrad=True)["optimizer"])


def test_asked_for_by_name_a_missing_apex_says_how_to_get_it(fake_apex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_module, "runs_on_gpu", lambda: True)
    how = "Build NVIDIA's apex from its sources with `APEX_CPP_EXT=1"
    (fake_apex / "amp_C.py").unlink()
    assert _refusal("apex").startswith(
        f"adam is apex, but apex is installed without apex.optimizers.FusedAdam or its compiled extension amp_C. {how}"
    )
    (fake_apex / "apex" / "optimizers.py").write_text("")
    sys.modules.pop("apex.optimizers", None)
    assert _refusal("apex").startswith(
        f"adam is apex, but the package called apex here is not NVIDIA's: run `pip uninstall apex`. {how}"
    )
    monkeypatch.setattr("dynmoe_ds.integrations.apex.find_apex", lambda: "absent")
    assert _refusal("apex").startswith(f"adam is apex, but apex is not installed. {how}")
    assert "`pip install apex` installs another project" in _refusal("apex")


def test_adam_and_adamw_decay_as_deepspeed_has_it(fake_apex: Path) -> None:
    """DeepSpeed's Adam is AdamW unless adam_w_mode is off."""
    param = torch.nn.Parameter(torch.ones(1))
    for kind, options, is_decoupled in [
        ("AdamW", {}, True), ("Adam", {}, True), ("Adam", {"adam_w_mode": False}, False), ("AdamW", TORCH, True)
    ]:  # fmt: skip
        optimizer = apex_adam(_settings(kind, betas=[0.8, 0.9], **options)["optimizer"])([param])
        assert optimizer.adam_w_mode is is_decoupled
        assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["lr"] == 0.1


def _train(rank: int, world_size: int, folder: str) -> dict[Any, list[float]]:
    """Losses with torch's and with apex's, with growth; and a larger pool, or a checkpoint, in between."""
    sys.path.insert(0, folder)
    out = {}
    for stage, kind in product((0, 1), ("torch", "apex")):
        config = deepspeed_config(stage)
        given = {"optimizer": apex_adam(config["optimizer"])} if kind == "apex" else {}
        engine = dm.initialize(TinyModel(1, num_experts=3), config, dm.AdaptationConfig(2, 2), **given)
        losses = train(engine, range(3), rank, world_size)
        assert engine.masters.optimizer_name() == ("FusedAdam" if kind == "apex" else "AdamW")
        if stage == 0:
            engine.resize_slots(10)
        else:
            engine.save_checkpoint(f"{folder}/{kind}")
            engine = dm.initialize(TinyModel(1, num_experts=3), config, dm.AdaptationConfig(2, 2), **given)
            engine.load_checkpoint(f"{folder}/{kind}")
        out[stage, kind] = losses + train(engine, range(3, 6), rank, world_size)
    return out


def test_apexs_adam_goes_on_through_growth_resizing_and_checkpoints(tmp_path: Path) -> None:
    write_fake_apex(tmp_path)
    losses = run_ranks(_train, 1, str(tmp_path), timeout_s=120)[0]
    for stage in (0, 1):
        assert losses[stage, "apex"] == pytest.approx(losses[stage, "torch"], abs=1e-5), stage


def test_an_optimizer_of_ones_own_and_a_choice_exclude_one_another() -> None:
    assert run_ranks(_both, 1) == ["adam is torch but an optimizer is given, too. Leave out one of them."]


def _both(rank: int, world_size: int) -> str:
    model = TinyModel(1)
    with pytest.raises(ConfigError) as caught:
        dm.initialize(model, deepspeed_config(1), optimizer=torch.optim.SGD(model.parameters(), 0.1), adam="torch")
    return str(caught.value)
