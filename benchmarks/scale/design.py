"""Which steps are measured: those that the model is fitted on, and those that it must predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dynmoe_ds.config.schema import (
    ExpertConfig,
    LlamaModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TelemetryConfig,
    TextDataConfig,
    TrainingConfig,
)
from dynmoe_ds.dispatch import DispatchConfig
from dynmoe_ds.planning import Layout
from dynmoe_ds.routing import TopAnyConfig, TopKConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A decoder, a micro step and a layout.

    router: `top_k`, whose k is the same for every token, or `top_any` with a budget of k, where tokens differ and the
    mean that was measured is what the model is given.
    """

    role: Literal["fit", "held out"]
    num_ranks: int = 1
    ep_size: int = 1
    zero_stage: int = 0
    hidden_size: int = 128
    num_layers: int = 4
    ffn: int = 256
    experts: int = 8
    k: int = 2
    router: Literal["top_k", "top_any"] = "top_k"
    length: int = 64
    batch: int = 4
    accumulation: int = 1
    vocab: int = 1024
    checkpointing: bool = False
    chunks: int = 1

    @property
    def name(self) -> str:
        ranks = "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        parts = [
            f"{ranks}, EP {self.ep_size}, ZeRO-{self.zero_stage}, T {self.length * self.batch}, D {self.hidden_size}",
            f"F {self.ffn}, {self.num_layers} layers, E {self.experts}, k {self.k}",
        ]
        parts += [f"{self.accumulation} micro steps"] if self.accumulation > 1 else []
        parts += [f"{self.chunks} chunks"] if self.chunks > 1 else []
        parts += ["recomputed"] if self.checkpointing else []
        parts += ["top-any"] if self.router == "top_any" else []
        parts += [f"V {self.vocab}"] if self.vocab != 1024 else []
        return ", ".join(parts)

    def config(self) -> RunConfig:
        """The run of which one step is measured."""
        return RunConfig(
            seed=0,
            run_dir="unused",
            model=LlamaModelConfig(
                hidden_size=self.hidden_size, num_layers=self.num_layers, num_heads=4,
                dense_ffn_hidden_size=2 * self.ffn, expert_ffn_hidden_size=self.ffn, moe_every=2,
                num_experts=self.experts, num_slots=self.experts,
            ),
            expert=ExpertConfig(kind="swiglu"),
            router=TopKConfig(k=self.k) if self.router == "top_k" else TopAnyConfig.budgeted(float(self.k)),
            adaptation=None,
            data=TextDataConfig(
                name="pydoc_topics", vocab_size=self.vocab, sequence_length=self.length, held_out_every=10
            ),
            optim=OptimConfig(
                lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, warmup_steps=0, final_lr_fraction=0.1,
                gradient_clipping=1.0,
            ),
            parallel=ParallelConfig(
                num_ranks=self.num_ranks, ep_size=self.ep_size, zero_stage=self.zero_stage, dtype="float32",
                activation_checkpointing="torch" if self.checkpointing else "none", process_group_timeout_s=60,
                dispatch=DispatchConfig(chunks=self.chunks),
            ),
            training=TrainingConfig(
                steps=1, micro_batch_size=self.batch, gradient_accumulation_steps=self.accumulation,
                log_every_steps=1, eval_every_steps=1, eval_sequences=1, sample_prompt="", sample_tokens=0,
            ),
            telemetry=TelemetryConfig(wandb_mode="disabled", wandb_project="none"),
        )  # fmt: skip

    def layout(self) -> Layout:
        return Layout(
            num_ranks=self.num_ranks, num_nodes=1, ep_size=self.ep_size, zero_stage=self.zero_stage, dtype="float32",
            checkpointing=self.checkpointing, chunks=self.chunks, by_node=False,
        )  # fmt: skip


def design() -> list[Case]:
    """Fitted on one and two ranks; held out are all of four ranks, others on one and two, and top-any."""
    one, two = Case(role="fit"), Case(role="fit", num_ranks=2, ep_size=2)
    four = Case(role="held out", num_ranks=4, ep_size=4)
    odd = {"hidden_size": 192, "ffn": 320, "experts": 12, "k": 3, "length": 128}
    return [
        one,
        replace(one, length=256),
        replace(one, length=256, k=4),
        replace(one, k=1),
        replace(one, hidden_size=256, ffn=512),
        replace(one, hidden_size=256, ffn=512, length=256),
        replace(one, ffn=1024, length=256),
        replace(one, experts=32),
        replace(one, num_layers=8),
        replace(one, accumulation=3),
        replace(one, vocab=4096),
        replace(one, length=256, checkpointing=True),
        *[replace(one, zero_stage=stage) for stage in (1, 2, 3)],
        replace(one, zero_stage=2, hidden_size=256, ffn=512, experts=16),
        *[replace(two, zero_stage=stage) for stage in range(4)],
        *[replace(two, ep_size=1, zero_stage=stage) for stage in range(4)],
        replace(two, length=256),
        replace(two, length=1024),
        replace(two, k=4, length=256),
        replace(two, k=1, length=256),
        replace(two, experts=32, length=256),
        replace(two, hidden_size=256, ffn=512),
        replace(two, zero_stage=1, hidden_size=256, ffn=512, experts=16),
        replace(two, zero_stage=3, hidden_size=256, ffn=512, experts=16),
        replace(two, ep_size=1, zero_stage=2, accumulation=3),
        replace(two, zero_stage=1, accumulation=3),
        replace(two, length=256, chunks=2),
        replace(two, length=256, checkpointing=True),
        # Held out.
        replace(one, role="held out", **odd),
        replace(one, role="held out", zero_stage=1, experts=4, length=512),
        replace(two, role="held out", **odd),
        replace(two, role="held out", length=256, k=8),
        replace(two, role="held out", length=256, experts=4),
        replace(two, role="held out", length=512),
        replace(two, role="held out", **odd, zero_stage=2, accumulation=2),
        replace(two, role="held out", **odd, ep_size=1, zero_stage=3),
        replace(two, role="held out", length=256, router="top_any"),
        *[replace(four, zero_stage=stage) for stage in range(4)],
        *[replace(four, ep_size=2, zero_stage=stage) for stage in (0, 1, 3)],
        *[replace(four, ep_size=1, zero_stage=stage) for stage in (0, 2)],
        replace(four, length=256),
        replace(four, length=256, k=4),
        replace(four, length=256, router="top_any"),
        replace(four, length=256, experts=32),
        replace(four, **odd),
        replace(four, **odd, ep_size=2, zero_stage=2, accumulation=2),
        replace(four, **odd, zero_stage=1, checkpointing=True),
    ]  # fmt: skip


def quick_design() -> list[Case]:
    """Whether everything runs: tiny sizes, one and two ranks."""
    tiny = {"hidden_size": 32, "num_layers": 2, "ffn": 32, "experts": 4, "length": 16, "batch": 2, "vocab": 300}
    one, two = Case(role="fit", **tiny), Case(role="fit", num_ranks=2, ep_size=2, **tiny)  # type: ignore[arg-type]
    return [
        one,
        replace(one, length=32),
        two,
        replace(two, zero_stage=1, k=1),
        replace(one, role="held out", router="top_any"),
        replace(two, role="held out", zero_stage=2, length=32),
    ]


def sweeps(cases: list[Case]) -> dict[str, list[tuple[float, Case]]]:
    """The curves of growth that are in a design: by what grows, (its value, the case) in ascending order.

    With tokens, experts and k on two ranks that share experts, 256 tokens a sequence; with ranks at EP of all.
    """
    two = replace(Case(role="fit", num_ranks=2, ep_size=2), length=256)

    def points(name: str, base: Case) -> list[tuple[float, Case]]:
        values = {
            case: getattr(case, name)
            for case in cases
            if replace(case, role="fit", **{name: getattr(base, name)}) == base
        }
        return sorted(((float(value), case) for case, value in values.items()), key=lambda point: point[0])

    ranks = [
        (float(case.num_ranks), case)
        for case in cases
        if replace(case, role="fit", num_ranks=2, ep_size=2) == two and case.num_ranks == case.ep_size
    ]
    return {
        "tokens per rank": [(length * case.batch, case) for length, case in points("length", two)],
        "experts per layer": points("experts", two),
        "experts per token": points("k", two),
        "ranks that share experts": sorted(ranks, key=lambda point: point[0]),
    }
