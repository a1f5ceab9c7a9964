"""The layer beside its peers: that the comparison is of equal work, and runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynmoe_ds as dm
from benchmarks.layer import candidates
from benchmarks.layer.__main__ import training_step
from benchmarks.layer.candidates import Cell, build, check_equal_outputs, dropped_share
from benchmarks.layer.loads import measure_load, random_tokens, set_loads, wanted_shares
from benchmarks.layer.report import BOTH, ratio, target_lines, write_report

ROOT = Path(__file__).parents[2]
NAMES = [
    "dense FFN", "ours: top_k", "ours: top_any", "ours: top_any_recommended", "ours: top_p", "ours: relu",
    "ours: expert_threshold", "top_any, padded", "DeepSpeed MoE, dropping", "DeepSpeed MoE, no dropping",
    "Mixtral, eager", "Mixtral, grouped_mm", "DeepSpeed AutoEP",
]  # fmt: skip
CELL = Cell(num_experts=8, k=2, routing="skewed", dtype="float32", ffn_hidden_size=24)


@pytest.mark.timeout(600)
def test_every_candidate_runs_and_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.layer", "--quick", "--output", f"{tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "layer.json").read_text())
    assert [cell["label"] for cell in found["cells"]] == [
        "E 4, k 2, F 64, skewed, float32",
        "E 8, k 2, F 64, uniform, bfloat16",
    ]
    for cell in found["cells"]:
        assert list(cell["candidates"]) == NAMES and cell["left_out"] == {}
        for name, row in cell["candidates"].items():
            forward, both = row["seconds"]["forward"], row["seconds"]["forward + backward"]
            assert 0 < forward["least"] < both["least"] <= both["median"] <= both["most"], name
            assert row["peak_bytes"] > row["gradient_bytes"] > 0, name
            if name != "dense FFN":
                assert row["mean_k"] == pytest.approx(2.0, rel=0.03), name
    page = (tmp_path / "layer.md").read_text()
    for name in NAMES:  # in the two summaries and in both cells
        assert sum(line.startswith(f"| {name} |") for line in page.splitlines()) == 4, name
    assert page.count("| faster than a peer at equal k | ours: top_k |") == 2
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_axes_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.layer", "--experts", "4", "--k", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "k is 4 with 4 experts but must be at least 1 and less than them." in done.stderr


def test_wanted_shares() -> None:
    assert wanted_shares(4, 2, "uniform").tolist() == [0.5] * 4
    assert wanted_shares(9, 1.8, "skewed").tolist() == pytest.approx([0.8, *[0.125] * 8])
    assert wanted_shares(4, 2, "skewed").tolist() == pytest.approx([1.0, *[1 / 3] * 3]), "no more than all tokens"


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ["top_k", *candidates.ROUTERS])
def test_routers_get_the_loads_that_are_asked_for(router: str, dtype: torch.dtype, routing: str) -> None:
    x = random_tokens(1024, 64, dtype)
    config: Any = dm.TopKConfig(k=3) if router == "top_k" else router
    layer = dm.MoELayer(hidden_size=64, ffn_hidden_size=8, num_experts=16, num_slots=16, router=config, seed=0)
    layer.to(dtype)
    before = measure_load(layer, x)
    set_loads(layer, x, wanted_shares(16, 3, routing))
    mask = layer.router(x, layer.active, None).mask
    shares = mask.double().mean(0)
    # Half a per cent of the tokens, and of a bias in bfloat16 what its 8 bits leave open.
    slack = 0.005 if dtype == torch.float32 else 0.02
    assert shares.sum().item() == pytest.approx(3, rel=2 * slack)
    assert shares[0].item() == pytest.approx(0.75 if routing == "skewed" else 3 / 16, abs=slack)
    if router != "top_any_recommended":  # its fallback goes to whom a token misses least
        assert (shares - wanted_shares(16, 3, routing)).abs().max() < slack
    found = measure_load(layer, x)
    assert found.mean_k == pytest.approx(shares.sum().item()) and found != before
    assert found.busiest == pytest.approx((mask.sum(0).max() / mask.sum(0).double().mean()).item())


def test_what_a_fallback_adds_is_counted() -> None:
    x = random_tokens(1024, 64, torch.float32)
    layer = dm.MoELayer(
        hidden_size=64, ffn_hidden_size=8, num_experts=16, num_slots=16, router="top_any_recommended", seed=0
    )
    set_loads(layer, x, wanted_shares(16, 1.5, "uniform"))
    one_token_of_every_expert = 16 / len(x)
    assert measure_load(layer, x).mean_k == pytest.approx(1.5, abs=one_token_of_every_expert)
    chose_nobody = int(layer.router(x, layer.active, None).unrouted.sum())
    assert chose_nobody > 3 * 16, "or what it adds could not be told from one token of every expert"


@pytest.mark.parametrize("k", [1, 2, 4])
def test_peers_compute_what_our_layer_computes(k: int) -> None:
    cell = Cell(num_experts=8, k=k, routing="uniform", dtype="float32", ffn_hidden_size=24)
    worst = check_equal_outputs(cell, random_tokens(96, 32, torch.float32))
    assert set(worst) == {"top_any, padded"} | (set(candidates.SAME_AS_TOP_K) if k > 1 else set())


@pytest.mark.parametrize("name", ["_mixtral", "_deepspeed_moe", "_auto_ep"])
def test_a_peer_that_computes_something_else_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = getattr(candidates, name)

    def with_another_gate(*args: Any) -> nn.Module:
        module = make(*args)
        gates = [param for key, param in module.named_parameters() if "gate.weight" in key or "wg.weight" in key]
        with torch.no_grad():
            gates[0][0, 0] += 0.5
        return module

    monkeypatch.setattr(candidates, name, with_another_gate)
    with pytest.raises(AssertionError, match="E 8, k 2, F 24, skewed, float32"):
        check_equal_outputs(CELL, random_tokens(96, 32, torch.float32))


def test_a_peer_that_cannot_run_is_left_out_and_the_page_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> nn.Module:
        raise RuntimeError("needs another device\nand more")

    monkeypatch.setattr(candidates, "_auto_ep", refuse)
    x = random_tokens(64, 32, torch.float32)
    found, left_out = build(CELL, x)
    assert list(found) == NAMES[:-1] and left_out == {"DeepSpeed AutoEP": "RuntimeError: needs another device"}
    spread = {"least": 1.0, "median": 1.0, "most": 1.0}
    row = {
        "seconds": {"forward": spread, "forward + backward": spread}, "peak_bytes": 1, "gradient_bytes": 1,
        "mean_k": None, "busiest": None, "dropped": 0.0, "deviation": None,
    }  # fmt: skip
    cell = {"num_experts": 8, "k": 2, "routing": "skewed", "dtype": "float32", "label": CELL.label}
    cell |= {"candidates": dict.fromkeys(found, row), "left_out": left_out}
    write_report({"settings": {}, "machine": {}, "cells": [cell]}, tmp_path)
    assert "DeepSpeed AutoEP is not there: RuntimeError: needs another device" in (tmp_path / "layer.md").read_text()


def test_padding_gives_every_expert_the_places_of_the_busiest() -> None:
    layer = dm.MoELayer(hidden_size=16, ffn_hidden_size=8, num_experts=4, num_slots=4, router="top_any", seed=0)
    x = random_tokens(30, 16, torch.float32)
    set_loads(layer, x, wanted_shares(4, 1.2, "skewed"))
    shapes: list[tuple[int, ...]] = []
    original = nn.functional.linear

    def note(rows: Tensor, weight: Tensor) -> Tensor:
        shapes.append(tuple(rows.shape))
        return original(rows, weight)

    padded = candidates.PaddedTopAny(layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", note)
        y, aux_loss = padded(x)
    busiest = int(layer.router(x, layer.active, None).mask.sum(0).max())
    assert busiest > 15 and shapes == [(busiest, 16), (busiest, 16), (busiest, 8)] * 4
    with dm.StepLedger() as ledger:
        want = layer(x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(aux_loss, ledger.aux_loss())


def test_what_a_capacity_of_the_mean_load_drops() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)  # 4, 1, 1 and 2

    class Given(nn.Module):
        def forward(self, hidden: Tensor, active: Tensor, real: Tensor | None) -> dm.Routing:
            return dm.Routing(mask=mask, weights=mask.float(), aux_losses={}, unrouted=~mask.any(1))

    layer = dm.MoELayer(hidden_size=8, ffn_hidden_size=8, num_experts=4, num_slots=4, router="top_k", seed=0)
    layer.router = Given()
    cell = Cell(num_experts=4, k=2, routing="skewed", dtype="float32", ffn_hidden_size=8)
    assert dropped_share(layer, torch.randn(4, 8), cell) == 2 / 8


def test_a_step_computes_all_gradients_anew() -> None:
    x = random_tokens(64, 32, torch.float32)
    found, _ = build(CELL, x)
    for name, candidate in found.items():
        step = training_step(candidate, x)
        step()
        first = [None if p.grad is None else p.grad.clone() for p in candidate.module.parameters()]
        step()
        assert any(grad is not None and grad.abs().sum() > 0 for grad in first), name
        for grad, param in zip(first, candidate.module.parameters(), strict=True):
            assert (grad is None) == (param.grad is None), name
            if grad is not None and param.grad is not None:
                torch.testing.assert_close(param.grad, grad, msg=name)


def test_ratios_are_to_the_dense_ffn() -> None:
    def row(seconds: float, peak: int) -> dict[str, Any]:
        return {"seconds": {"forward": {"least": seconds, "most": 99.0}}, "peak_bytes": peak}

    cell = {"candidates": {"dense FFN": row(2.0, 10), "other": row(3.0, 40)}}
    assert ratio(cell, "other", "forward") == 1.5 and ratio(cell, "other", "peak_bytes") == 4.0


def test_targets_are_counted_and_what_is_missed_is_named() -> None:
    def cell(label: str, **both: float) -> dict[str, Any]:
        names = {"dense": "dense FFN", "top_k": "ours: top_k", "top_any": "ours: top_any", "padded": "top_any, padded"}
        seconds = {names.get(name, name): least for name, least in both.items()}
        rows = {name: {"seconds": {"forward": {"least": s}, BOTH: {"least": s}}} for name, s in seconds.items()}
        return {"label": label, "candidates": rows}

    near = cell("near", dense=1.0, top_k=1.04, top_any=1.05, padded=3.2, Mixtral=1.05)
    far = cell("far", dense=1.0, top_k=1.2, top_any=1.3, padded=3.8, Mixtral=1.1)
    page = list(target_lines([near, far]))
    for what in ("forward", BOTH):
        assert f"| at most 1.05 times the dense FFN | ours: top_k | {what} | 1 of 2 |" in page
        assert f"| at most 1.05 times the dense FFN | ours: top_any | {what} | 1 of 2 |" in page
        assert f"| at least 3 times as fast as top_any, padded | ours: top_any | {what} | 1 of 2 |" in page
        assert f"| faster than a peer at equal k | ours: top_k | {what} | 1 of 2 |" in page
        assert f"- far, {what}: ours: top_any 2.92 times as fast as top_any, padded" in page
        assert f"- far, {what}: Mixtral 1.10, ours: top_k 1.20" in page
    assert not any(line.startswith("- near") for line in page)
    alone = "\n".join(target_lines([cell("near", dense=1.0, top_k=1.04, top_any=1.05)]))
    assert "| at most 1.05" in alone and "padded" not in alone and "peer" not in alone and "Missed" not in alone
