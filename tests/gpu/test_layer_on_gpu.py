"""What only a GPU can show. Not run yet on any: these tests are ready for the first machine that has one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import dynmoe_ds as dm
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


def static_layer(expert: str = "swiglu") -> dm.MoELayer:
    return dm.MoELayer(
        hidden_size=64,
        ffn_hidden_size=128,
        num_experts=5,
        num_slots=8,
        router=dm.TopAnyConfig(k_max=3),
        expert=expert,
        seed=0,
        dispatch=dm.DispatchConfig(static_shapes=True),
    ).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
def test_static_shapes_never_wait_for_the_device(expert: str) -> None:
    layer = static_layer(expert)
    x = torch.randn(50, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).square().sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).square().sum().backward()
        layer.dispatch = dm.DispatchConfig()
        with pytest.raises(RuntimeError):
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_a_layer_with_other_tokens() -> None:
    layer = static_layer().eval()
    x = torch.randn(50, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in range(3):
            x.copy_(torch.randn(50, 64, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert_near(y, layer(x).clone(), torch.bfloat16)


@pytest.mark.launcher
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_smoke_experiment_runs_on_one_gpu(stage: int, tmp_path: object) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    command = [sys.executable, "-m", "dynmoe_ds", "train", "experiment=smoke", "parallel=single"]
    command += [f"run_dir={tmp_path}/run", f"parallel.zero_stage={stage}", "telemetry=disabled"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
