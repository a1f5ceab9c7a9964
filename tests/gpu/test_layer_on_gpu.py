"""What only a GPU can show. Not run yet on any: these tests are ready for the first machine that has one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dynmoe_ds as dm
from dynmoe_ds.moe.token_sampler import TokenSampler
from tests.helpers.reference import assert_near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("router", ["top_any", "top_any_recommended"])
@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
def test_a_layer_on_a_gpu_equals_itself_on_the_cpu(expert: str, router: str) -> None:
    def run(device: str) -> list[torch.Tensor]:
        layer = dm.MoELayer(
            hidden_size=64, ffn_hidden_size=128, num_experts=5, num_slots=8, router=router, expert=expert, seed=0
        ).to(device)
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        with dm.StepLedger() as ledger:
            y = layer(x, token_mask=(torch.arange(50) < 45).to(device))
        (y.square().sum() + ledger.aux_loss()).backward()
        return [y, x.grad, *(param.grad for param in layer.parameters())]

    for expected, actual in zip(run("cpu"), run("cuda"), strict=True):
        assert_near(actual.cpu(), expected, torch.float32)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def static_layer(expert: str = "swiglu", dtype: torch.dtype = torch.bfloat16, router: str = "top_any") -> dm.MoELayer:
    presets = {"top_any": dm.TopAnyConfig(), "top_any_recommended": dm.TopAnyConfig.recommended()}
    return dm.MoELayer(
        hidden_size=64,
        ffn_hidden_size=128,
        num_experts=5,
        num_slots=8,
        router=replace(presets[router], k_max=3),
        expert=expert,
        seed=0,
        dispatch=dm.DispatchConfig(static_shapes=True),
    ).to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("router", ["top_any", "top_any_recommended"])
@pytest.mark.parametrize("expert", ["swiglu", "geglu", "gelu"])
def test_static_shapes_never_wait_for_the_device(expert: str, router: str, dtype: torch.dtype) -> None:
    """Whatever is recorded: records, strain, kinds of tokens and a sample of them, with padding."""
    layer = static_layer(expert, dtype, router)
    x = torch.randn(50, 64, device="cuda", dtype=dtype, requires_grad=True)
    real, kinds = torch.arange(50, device="cuda") < 45, torch.arange(50, device="cuda") % 2

    def step() -> None:
        with dm.StepLedger(with_strain=True, sampler=TokenSampler(4), token_kinds=kinds, num_kinds=2) as ledger:
            (layer(x, token_mask=real).square().sum() + ledger.aux_loss()).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        layer.dispatch = dm.DispatchConfig()
        with pytest.raises(RuntimeError):
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`work` as a graph, after it has run a few times as it is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_a_layer_with_other_tokens(dtype: torch.dtype) -> None:
    layer = static_layer(dtype=dtype).eval()
    x, y = torch.randn(50, 64, device="cuda", dtype=dtype), torch.empty(50, 64, device="cuda", dtype=dtype)
    with torch.no_grad():
        graph = captured(lambda: y.copy_(layer(x)))
        for seed in range(3):
            x.copy_(torch.randn(50, 64, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert_near(y, layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
def test_a_cuda_graph_replays_a_training_step_with_other_tokens(expert: str, dtype: torch.dtype) -> None:
    layer, again = (static_layer(expert, dtype) for _ in range(2))
    x = torch.randn(50, 64, device="cuda", dtype=dtype, requires_grad=True)

    def step(layer: dm.MoELayer, x: torch.Tensor) -> None:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        with dm.StepLedger() as ledger:
            (layer(x).square().mean() + ledger.aux_loss()).backward()

    graph = captured(lambda: step(layer, x))
    for seed in range(3):
        tokens = torch.randn(50, 64, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
        with torch.no_grad():
            x.copy_(tokens)
        graph.replay()
        tokens.requires_grad_()
        step(again, tokens)
        assert_near(x.grad, tokens.grad, what="x")
        for (name, param), other in zip(layer.named_parameters(), again.parameters(), strict=True):
            assert_near(param.grad, other.grad, what=name)


def _equal_to_one_gpu(rank: int, store: str, dtype: torch.dtype, dispatch: dm.DispatchConfig) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    parts = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to("cuda", dtype).split([29, 11])

    def run(ep_size: int, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = {"hidden_size": 64, "ffn_hidden_size": 128, "num_experts": 6, "num_slots": 8}
        way = dispatch if ep_size > 1 else None
        layer = dm.MoELayer(**sizes, ep_size=ep_size, router="top_any_recommended", seed=0, dispatch=way)
        layer.to("cuda", dtype)
        x = tokens.clone().requires_grad_()
        with dm.StepLedger() as ledger:
            y = layer(x)
        (y.square().mean() + ledger.aux_loss()).backward()
        return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}

    got, alone = run(2, parts[rank]), [run(1, part) for part in parts]
    for name, value in got.items():
        want = alone[rank][name]
        if name.startswith("experts."):  # of the tokens of both ranks, of the slots here
            want = sum(found[name].double() for found in alone)[4 * rank : 4 * rank + 4]
        assert_near(value, want, what=name)
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dispatch", [dm.DispatchConfig(), dm.DispatchConfig(chunks=3)], ids=["whole", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_gpus_equal_one(dtype: torch.dtype, dispatch: dm.DispatchConfig, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_equal_to_one_gpu, (f"{tmp_path}/store", dtype, dispatch), nprocs=2)


@pytest.mark.launcher
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_smoke_experiment_runs_on_one_gpu(stage: int, tmp_path: object) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    command = [sys.executable, "-m", "dynmoe_ds", "train", "experiment=smoke", "parallel=single"]
    command += [f"run_dir={tmp_path}/run", f"parallel.zero_stage={stage}", "telemetry=disabled"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
