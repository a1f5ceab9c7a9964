"""How many tokens per second does the demo model train at, in how much memory, and what does its adaptation cost?

    python -m benchmarks.train                  # one rank, then two; minutes
    python -m benchmarks.train --ranks 1 --rounds 30

The decoder of `experiment=demo` with all its slots live, on CPU ranks of this machine, through DeepSpeed engines of the
same settings: with our layer, with DeepSpeed's MoE layer in the same places, and dense, with the FLOPs of k experts
there. Candidates take turns step by step. The learning rate is 0, so that routing stays as it is set; the optimiser
computes all the same.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dynmoe_ds as dm
from benchmarks import side_by_side
from benchmarks.layer.candidates import AUX_WEIGHT, DenseFFN
from benchmarks.layer.loads import set_loads, wanted_shares
from dynmoe_ds.config.deepspeed_json import to_deepspeed
from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.data import TrainingOrder
from dynmoe_ds.models import build_decoder, parameter_groups
from dynmoe_ds.routing import RouterConfig
from dynmoe_ds.training.tasks import build_task

K = 2
DENSE = "dense"
WARM_UP_STEPS = 30
"""In which a budget comes to its target."""

QUICK = (
    "model.hidden_size=32", "model.num_layers=2", "model.expert_ffn_hidden_size=32", "model.dense_ffn_hidden_size=64",
    "model.num_slots=8", "data.sequence_length=32", "data.vocab_size=300", "training.micro_batch_size=2",
)  # fmt: skip

EXPLANATION = (
    "Tokens per second are those of the least step time over rounds in which all candidates take turns, one optimiser "
    "step each, of the slowest rank; beside the least time of a step stands the greatest. Memory is what an engine "
    "holds after its first step, parameters and optimiser state included, and the peak of what a step allocates beyond "
    "that, on rank 0. Each cost is the difference of two steps in the same round, as a share of the least step: the "
    "median over rounds, and the range of its middle half. Where a difference is lost in the machine's noise, records "
    "are also timed by themselves, inside a step."
)
COSTS = {
    "records": "records of every step",
    "records inside": "the same, timed by themselves",
    "strain": "strain of experts, in the steps of a window",
    "window": "a window's end without a change",
    "growth": "a window's end at which every layer splits an expert",
}


class DeepSpeedFFN(nn.Module):
    """DeepSpeed's MoE layer, dropping nothing, behind the interface of an MLP. aux_loss: of its last forward pass."""

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, num_experts: int, ep_size: int, drop_tokens: bool
    ) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.moe = MoE(
            hidden_size,
            DenseFFN(hidden_size, ffn_hidden_size),
            num_experts=num_experts,
            ep_size=ep_size,
            k=K,
            drop_tokens=drop_tokens,
        )
        self.aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.aux_loss, _ = self.moe(x)
        return y


class Setting:
    """What all candidates of one rank share: configuration, data, and how models and engines are made.

    Collective: every rank.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from dynmoe_ds.engine import seam

        seam.init_distributed(args.timeout)
        size = dist.get_world_size()
        layout = "parallel=single" if size == 1 else "parallel=local"
        overrides = ["experiment=demo", layout, f"parallel.num_ranks={size}", f"parallel.ep_size={size}"]
        overrides += ["run_dir=runs/benchmark-train", *(QUICK if args.quick else ())]
        self.config: RunConfig = load_config(overrides)
        self.task = build_task(self.config)
        self.device = torch.device("cpu")
        self.steps_done = 0

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        training = self.config.training
        return training.micro_batch_size * dist.get_world_size() * self.task.tokens_per_example

    def batch(self) -> dict[str, Tensor]:
        """The next batch of this rank."""
        self.steps_done += 1
        return self._batch(self.steps_done, dist.get_rank(), dist.get_world_size())

    def _batch(self, step: int, rank: int, world_size: int) -> dict[str, Tensor]:
        order = TrainingOrder(
            seed=0, num_sequences=len(self.task.train), micro_batch_size=self.config.training.micro_batch_size,
            gradient_accumulation_steps=1, rank=rank, world_size=world_size,
        )  # fmt: skip
        return self.task.train.batch(order.indices(step, 0), self.device)

    def deepspeed_json(self) -> dict[str, Any]:
        """The demo's, at a learning rate of 0.

        With small buckets for gradients: DeepSpeed's default, 2 GB at ZeRO-2, would be all that is seen of memory.
        """
        settings = to_deepspeed(self.config)
        settings["zero_optimization"]["reduce_bucket_size"] = 2**21
        settings["optimizer"]["params"]["lr"] = 0.0
        return settings

    def our_model(self, router: RouterConfig, num_experts: int | None = None) -> nn.Module:
        """The demo model with this router; num_experts: live ones, None for all slots."""
        sizes = self.config.model
        model = replace(sizes, num_experts=num_experts or sizes.num_slots)
        data = self.task.data
        return build_decoder(replace(self.config, router=router, model=model), data.vocab_size, data.end_of_text)

    def model_with(self, make_ffn: Callable[[int, int], nn.Module]) -> nn.Module:
        """The demo model whose layers with experts have `make_ffn(hidden_size, ffn_hidden_size)` instead."""
        model, sizes = self.our_model(dm.TopKConfig(k=K)), self.config.model
        for index in sizes.moe_layers():
            model.model.layers[index].mlp = make_ffn(sizes.hidden_size, sizes.expert_ffn_hidden_size)
        return model

    @torch.no_grad()
    def set_mean_k(self, model: nn.Module) -> None:
        """Set thresholds, layer after layer, so that every expert takes K / E of the tokens of one batch.

        All ranks take the first rank's batch, so that their thresholds are the same. Collective: every rank.
        """
        batch, seen = self._batch(0, 0, 1), {}

        def note(layer: dm.MoELayer, kind: str, value: Tensor) -> None:
            if kind == "input":
                seen[layer] = value

        for layer in [module for module in model.modules() if isinstance(module, dm.MoELayer)]:
            with dm.StepLedger(watch=note):
                model(**batch)
            set_loads(layer, seen[layer], wanted_shares(layer.num_slots, K, "uniform"))


class Candidate:
    """One engine. `step()` is an optimiser step and gives its seconds on the slowest rank. Collective: every rank."""

    def __init__(self, setting: Setting, engine: Any) -> None:
        self.setting, self.engine = setting, engine
        self._peers = [module for module in engine.module.modules() if isinstance(module, DeepSpeedFFN)]

    @classmethod
    def ours(
        cls,
        setting: Setting,
        router: RouterConfig,
        *,
        num_experts: int | None = None,
        adaptation: dm.AdaptationConfig | None = None,
        sets_mean_k: bool = False,
    ) -> Candidate:
        """With our layer and engine."""
        model = setting.our_model(router, num_experts)
        if sets_mean_k:
            setting.set_mean_k(model)
        groups = parameter_groups(model, setting.config.optim.weight_decay)
        return cls(setting, dm.initialize(model, setting.deepspeed_json(), adaptation, model_parameters=groups))

    @classmethod
    def stock(cls, setting: Setting, make_ffn: Callable[[int, int], nn.Module]) -> Candidate:
        """With DeepSpeed's engine, as it is."""
        import deepspeed

        from dynmoe_ds.engine import seam

        model = setting.model_with(make_ffn)
        groups = parameter_groups(model, setting.config.optim.weight_decay)
        if any(isinstance(module, DeepSpeedFFN) for module in model.modules()):
            groups = seam.split_expert_groups(groups)
        engine, *_ = deepspeed.initialize(model=model, config=setting.deepspeed_json(), model_parameters=groups)
        return cls(setting, engine)

    def step(self) -> float:
        batch = self.setting.batch()
        dist.barrier()
        began = time.perf_counter()
        loss = self.engine(**batch).loss
        for peer in self._peers:
            loss = loss + AUX_WEIGHT * peer.aux_loss
        self.engine.backward(loss)
        self.engine.step()
        seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return seconds.item()

    def mean_k(self) -> float:
        """Over layers and all steps since the last call. Collective: every rank."""
        records = self.engine.take_records().values()
        return statistics.mean(float(record.num_assignments / record.num_tokens) for record in records)


def makers(setting: Setting) -> dict[str, Callable[[], Candidate]]:
    """How to make every candidate, by name."""
    slots, ep_size = setting.config.model.num_slots, dist.get_world_size()

    def deepspeed_ffn(hidden_size: int, ffn_hidden_size: int, *, drop_tokens: bool) -> nn.Module:
        return DeepSpeedFFN(hidden_size, ffn_hidden_size, slots, ep_size, drop_tokens)

    return {
        DENSE: lambda: Candidate.stock(setting, lambda hidden, ffn: DenseFFN(hidden, K * ffn)),
        "DeepSpeed MoE, dropping": lambda: Candidate.stock(setting, partial(deepspeed_ffn, drop_tokens=True)),
        "DeepSpeed MoE, no dropping": lambda: Candidate.stock(setting, partial(deepspeed_ffn, drop_tokens=False)),
        "ours: top_k": lambda: Candidate.ours(setting, dm.TopKConfig(k=K)),
        "ours: top_any_recommended": lambda: Candidate.ours(setting, dm.TopAnyConfig.recommended(), sets_mean_k=True),
        "ours: top_any_budget": lambda: Candidate.ours(setting, dm.TopAnyConfig.budgeted(K)),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything on one rank; equal on all but for memory. Collective: every rank."""
    setting = Setting(args)
    candidates, rows = {}, {}
    for name, make in makers(setting).items():
        with side_by_side.AllocatedBytes(setting.device) as held:
            candidates[name] = make()
            candidates[name].step()
            gc.collect()
        with side_by_side.AllocatedBytes(setting.device) as used:
            candidates[name].step()
        rows[name] = {"held_bytes": held.held, "peak_bytes": held.held + used.peak}
    for _ in range(2 if args.quick else WARM_UP_STEPS):
        candidates["ours: top_any_budget"].step()
    for name in rows:
        if name.startswith("ours"):
            candidates[name].mean_k()  # forgets the steps so far
    turns = {name: lambda candidate=candidate: {"step": candidate.step()} for name, candidate in candidates.items()}
    for name, times in side_by_side.plain(side_by_side.take_turns(turns, args.rounds)).items():
        rows[name]["seconds"] = times["step"]
        rows[name]["mean_k"] = candidates[name].mean_k() if name.startswith("ours") else None
        rows[name]["tokens_per_second"] = setting.tokens_per_step / times["step"]["least"]
    budgeted = candidates["ours: top_any_budget"]
    candidates.clear()
    gc.collect()
    costs = measure_costs(setting, budgeted, args)
    sizes = {"ranks": dist.get_world_size(), "tokens_per_step": setting.tokens_per_step}
    return sizes | {"zero_stage": setting.config.parallel.zero_stage, "candidates": rows, "costs": costs}


def measure_costs(setting: Setting, budgeted: Candidate, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of each of COSTS, and of the step that it is a share of, by name. Collective: every rank."""
    router = dm.TopAnyConfig.budgeted(K)
    never = 10**6
    strained = Candidate.ours(
        setting, router, adaptation=dm.AdaptationConfig(every_steps=never, window_steps=never, rule="split_strained")
    )
    # Of few experts none is idle, so none is pruned.
    ending = Candidate.ours(
        setting,
        router,
        num_experts=setting.config.model.num_experts,
        adaptation=dm.AdaptationConfig(every_steps=2, window_steps=1, rule="split_strained", last_growth_step=0),
    )
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COSTS}
    for number in range(args.rounds + 1):
        with without_records(budgeted.engine):
            bare = budgeted.step()
        recorded = budgeted.step()
        pairs = {"records": (bare, recorded), "strain": (budgeted.step(), strained.step())}
        with timed_records(budgeted.engine) as spent:
            whole = budgeted.step()
        pairs["records inside"] = (whole - sum(spent), whole)
        pairs["window"] = (ending.step(), ending.step())
        assert _num_changes(ending) == (0, 0), "a window's end was to change nothing"
        if number > 0:  # the first round warms up
            for name, pair in pairs.items():
                found[name].append(pair)
    found["growth"] = list(_growths(setting, router, args.rounds))
    return {name: _cost(pairs) for name, pairs in found.items()}


def _growths(setting: Setting, router: RouterConfig, rounds: int) -> Iterator[tuple[float, float]]:
    """A step, and the next one, at whose end every layer splits an expert: seconds of both. Collective: every rank.

    When the pools are full it begins anew with as few experts as the demo does. The first pair warms up.
    """
    sizes = setting.config.model
    adaptation = dm.AdaptationConfig(every_steps=2, window_steps=1, rule="split_strained")
    count = 0
    while count < rounds:
        grown = Candidate.ours(setting, router, num_experts=sizes.num_experts, adaptation=adaptation)
        for number in range(sizes.num_slots - sizes.num_experts):
            pair = grown.step(), grown.step()
            born, _ = _num_changes(grown)
            assert born == len(sizes.moe_layers()), f"{born} layers got an expert, not every one"
            if number > 0 and count < rounds:
                count += 1
                yield pair


def _num_changes(candidate: Candidate) -> tuple[int, int]:
    """How many experts the adaptations since the last call have added and pruned."""
    layers = [layer for event in candidate.engine.take_events() for layer in event.layers.values()]
    return sum(len(layer["grown"]) for layer in layers), sum(len(layer["pruned"]) for layer in layers)


@contextmanager
def without_records(engine: Any) -> Iterator[None]:
    """The engine's steps as they would be if nothing were recorded: all records are one that was made before."""
    from dynmoe_ds.moe import ledger
    from dynmoe_ds.routing import RoutingRecords

    made: list[RoutingRecords] = []
    original = RoutingRecords.of

    def made_before(*args: Any) -> RoutingRecords:
        if not made:
            made.append(original(*args))
        return made[0]

    with (
        mock.patch.object(ledger.RoutingRecords, "of", made_before),
        mock.patch.object(ledger, "count_kinds", lambda *_: {}),
        mock.patch.object(engine.records, "keep", lambda *_: None),
    ):
        yield


@contextmanager
def timed_records(engine: Any) -> Iterator[list[float]]:
    """The seconds that this rank spends on recording inside the block: making records, and keeping them."""
    from dynmoe_ds.moe import ledger

    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            result = function(*args)
            spent.append(time.perf_counter() - began)
            return result

        return call

    book = engine.records
    with (
        mock.patch.object(ledger.RoutingRecords, "of", timed(ledger.RoutingRecords.of)),
        mock.patch.object(ledger, "count_kinds", timed(ledger.count_kinds)),
        mock.patch.object(book, "add_micro_step", timed(book.add_micro_step)),
        mock.patch.object(book, "keep", timed(book.keep)),
    ):
        yield spent


def _cost(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of pairs (seconds without, seconds with): the difference over rounds, and the least step without."""
    differences = sorted(after - before for before, after in pairs)
    quarters = statistics.quantiles(differences, n=4) if len(differences) > 1 else differences * 3
    low, median, high = quarters
    return {"seconds": median, "low": low, "high": high, "step": min(before for before, _ in pairs)}


def lines(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The tables, two for every number of ranks."""
    yield EXPLANATION
    for run in runs:
        rows, dense = run["candidates"], run["candidates"][DENSE]
        ranks = f"{run['ranks']} rank{'s' if run['ranks'] > 1 else ''}, ZeRO-{run['zero_stage']}"
        yield from ("", f"## {ranks}, {run['tokens_per_step']} tokens per step", "")
        header = ["", "mean k", "tokens per second", "of dense", "step, ms", "memory, MB", "of dense"]
        yield from side_by_side.table(
            header,
            [
                [
                    name,
                    "" if row["mean_k"] is None else f"{row['mean_k']:.2f}",
                    f"{row['tokens_per_second']:.0f}",
                    f"{row['tokens_per_second'] / dense['tokens_per_second']:.2f}",
                    f"{1e3 * row['seconds']['least']:.1f} ({1e3 * row['seconds']['most']:.1f})",
                    f"{row['peak_bytes'] / 1e6:.1f}",
                    f"{row['peak_bytes'] / dense['peak_bytes']:.2f}",
                ]
                for name, row in rows.items()
            ],
        )
        yield ""
        yield from side_by_side.table(
            ["cost of", "ms", "of a step", "middle half"],
            [
                [
                    COSTS[name],
                    f"{1e3 * cost['seconds']:.2f}",
                    f"{100 * cost['seconds'] / cost['step']:.1f} %",
                    f"{100 * cost['low'] / cost['step']:.1f} to {100 * cost['high'] / cost['step']:.1f} %",
                ]
                for name, cost in run["costs"].items()
            ],
        )


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A row per number of ranks: tokens per second, memory, and the costs as shares of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(runs), 3, figsize=(15, 3.2 * len(runs) + 0.4), squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": [1.1, 1.1, 1]},
    )  # fmt: skip
    for row, run in zip(axes, runs, strict=True):
        names = list(run["candidates"])[::-1]
        title = f"{run['ranks']} rank{'s' if run['ranks'] > 1 else ''}"
        for axis, what, label in (
            (row[0], "tokens_per_second", "tokens per second (more is better)"),
            (row[1], "peak_bytes", "peak memory of a rank, MB (less is better)"),
        ):
            scale = 1e-6 if what == "peak_bytes" else 1.0
            values = [scale * run["candidates"][name][what] for name in names]
            dense = scale * run["candidates"][DENSE][what]
            colours = ["tab:blue" if n.startswith("ours") else "0.4" if n == DENSE else "tab:orange" for n in names]
            axis.barh(names, values, color=colours)
            for y, value in enumerate(values):
                text = f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
                axis.text(max(value, dense), y, f" {text} ({value / dense:.2f} of dense)", va="center", fontsize=8)
            axis.axvline(dense, color="0.4", linestyle="--", linewidth=1)
            axis.set_xlim(0, 1.75 * max(values))
            axis.xaxis.set_major_locator(plt.MaxNLocator(5))
            axis.set(xlabel=label, title=title)
            axis.tick_params(labelsize=8)
        costs = {COSTS[name]: cost for name, cost in reversed(run["costs"].items())}
        shares = [100 * cost["seconds"] / cost["step"] for cost in costs.values()]
        ends = [
            [100 * (cost[end] - cost["seconds"]) / cost["step"] for cost in costs.values()] for end in ("low", "high")
        ]
        labels = [name.replace(" at which ", "\nat which ").replace(", in ", ",\nin ") for name in costs]
        row[2].barh(
            labels, shares, xerr=[[-low for low in ends[0]], ends[1]], color="tab:blue", ecolor="0.3", capsize=3
        )
        for y, (share, high) in enumerate(zip(shares, ends[1], strict=True)):
            row[2].text(max(share + high, 0), y, f"  {share:.1f} %", va="center", fontsize=8)
        row[2].axvline(0, color="0.3", linewidth=1)
        row[2].margins(x=0.35)
        row[2].set(xlabel="extra time, % of a step", title=f"{title}: what it costs")
        row[2].tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = side_by_side.parser("train", __doc__ or "", rounds=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, help="of a rank (default: the cores, shared out)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one number of ranks may take")
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.rounds, args.threads = [1], 2, 1
    machine, found = side_by_side.machine(torch.device("cpu")), []
    for size in args.ranks:
        began, num_threads = time.perf_counter(), args.threads or max((os.cpu_count() or 1) // size, 1)
        ranks = side_by_side.run_ranks(measure, size, args, timeout_s=args.timeout, num_threads=num_threads)
        found.append(ranks[0] | {"threads_per_rank": num_threads})
        print(f"{size} ranks: {time.perf_counter() - began:.0f} s", flush=True)
    results = {"settings": side_by_side.settings(args), "machine": machine, "runs": found}
    paths = side_by_side.write_page(args.output, "train", "Training speed of the demo model", results, lines(found))
    picture = args.output / "train.png"
    draw(found, picture)
    for path in (*paths, picture):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
