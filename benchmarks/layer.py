"""How much slower is a `MoELayer` than one dense SwiGLU FFN of the same FLOPs?

    python benchmarks/layer.py --output docs/results/layer.json

Forward and backward in one process, the two side by side in every round, minima over rounds, since machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynmoe_ds as dm


class DenseFFN(nn.Module):
    """`w2 (silu(w1 x) * (w3 x))` of one width."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.w2 = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def layer_with_mean_k(
    x: Tensor, ffn_hidden_size: int, num_experts: int, k: int, router: str
) -> tuple[dm.MoELayer, float]:
    """A layer with thresholds set so that every expert takes k/K of the tokens `x` [T, D]; and its measured mean k."""
    layer = dm.MoELayer(
        hidden_size=x.shape[1],
        ffn_hidden_size=ffn_hidden_size,
        num_experts=num_experts,
        num_slots=num_experts,
        router=router,
        seed=0,
    )
    with torch.no_grad():
        if layer.router.config.score == "softmax":
            scores = F.log_softmax(x @ layer.router.weight.T, dim=1) + math.log(num_experts)
        else:
            scores = F.normalize(x, dim=1) @ F.normalize(layer.router.weight, dim=1).T
        layer.router.threshold.copy_(torch.quantile(scores, 1 - k / num_experts, dim=0))
    with dm.StepLedger() as ledger:
        layer(x)
    (records,) = ledger.records().values()
    return layer.to(x.dtype), records.mean_k


def seconds(module: nn.Module, x: Tensor) -> float:
    """Wall time of one forward and backward pass; a layer's auxiliary losses are part of it."""
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    start = time.perf_counter()
    with dm.StepLedger() as ledger:
        loss = module(x).square().mean()
    (loss + ledger.aux_loss()).backward()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, k: int, router: str, dtype: torch.dtype) -> dict[str, object]:
    """One row of the table."""
    torch.manual_seed(0)
    x = torch.randn(args.tokens, args.hidden)
    layer, mean_k = layer_with_mean_k(x, args.ffn, args.experts, k, router)
    x, layer = x.to(dtype), layer.to(dtype)
    dense = DenseFFN(args.hidden, round(mean_k * args.ffn)).to(dtype)
    times: dict[str, list[float]] = {"dense": [], "layer": []}
    for round_ in range(args.rounds + 1):
        for name, module in (("dense", dense), ("layer", layer)):
            elapsed = seconds(module, x)
            if round_ > 0:  # the first round warms up
                times[name].append(elapsed)
    best = {name: min(values) for name, values in times.items()}
    return {
        "router": router,
        "dtype": str(dtype).removeprefix("torch."),
        "k": k,
        "mean_k": round(mean_k, 3),
        "dense_ms": round(best["dense"] * 1e3, 1),
        "layer_ms": round(best["layer"] * 1e3, 1),
        "ratio": round(best["layer"] / best["dense"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="also write the results there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(f"{'router':22}{'dtype':10}{'mean k':>8}{'dense ms':>10}{'layer ms':>10}{'ratio':>8}")
    for dtype in (torch.float32, torch.bfloat16):
        for router in ("top_any", "top_any_recommended"):
            for k in (2, 6):
                row = measure(args, k, router, dtype)
                rows.append(row)
                print("{router:22}{dtype:10}{mean_k:8.2f}{dense_ms:10.1f}{layer_ms:10.1f}{ratio:8.3f}".format(**row))
    if args.output:
        lines = ["| router | dtype | mean k | dense, ms | layer, ms | ratio |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [
            "| {router} | {dtype} | {mean_k:.2f} | {dense_ms} | {layer_ms} | {ratio} |".format(**row) for row in rows
        ]
        print("\n".join(["", *lines]))
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
