"""What a run says about its layers, kinds of tokens and cost, against loops over the masks of its routers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.run_config import small_run
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.data import TokenSequences
from dynmoe_ds.data.llava import token_kinds_of
from dynmoe_ds.models import FlopCount, ParameterCount
from dynmoe_ds.moe import MoELayer, Placement
from dynmoe_ds.routing import BudgetConfig, RoutingRecords, TopAnyConfig
from dynmoe_ds.telemetry import read_metrics
from dynmoe_ds.training import Trainer, trainer
from dynmoe_ds.training.expert_loads import ExpertLoads
from dynmoe_ds.training.observation import cost_metrics, kind_metrics, pool_metrics, rank_metrics
from dynmoe_ds.training.tasks import LanguageModeling

KINDS = ("even", "odd")
LAYER = "model.layers.1.mlp"
EVAL_SEQUENCES = 5  # of batches of 4: the last three rows are repeats


class _Parities(TokenSequences):
    """Text whose tokens are labelled by the parity of their ids."""

    def batch(self, indices: Any, device: Any = "cpu", epochs: Any = None) -> dict[str, torch.Tensor]:
        batch = super().batch(indices, device)
        return batch | {"token_kinds": batch["input_ids"] % 2}


class _ParityTask(LanguageModeling):
    token_kinds = KINDS

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.data = replace(
            self.data, train=_Parities(self.data.train.tokens), held_out=_Parities(self.data.held_out.tokens)
        )


def _config(run_dir: Path, **values: Any) -> RunConfig:
    return small_run(
        run_dir,
        router=TopAnyConfig(budget=BudgetConfig(target_k=2.0)),
        training__steps=6,
        training__log_every_steps=2,
        training__eval_every_steps=3,
        training__eval_sequences=EVAL_SEQUENCES,
        training__sample_tokens=0,
        **{"telemetry__detail": "detailed", **values},
    )


def _train(rank: int, world_size: int, config: RunConfig) -> dict[str, Any]:
    """A run, and the masks of its model on the held-out sequences, one at a time."""
    trainer.build_task = _ParityTask
    run = Trainer(config)
    run.run()
    layer = run.engine.module.get_submodule(LAYER)
    assert isinstance(layer, MoELayer)
    masks: list[torch.Tensor] = []
    layer.router.register_forward_hook(lambda _, args, routing: masks.append(routing.mask))
    held_out = run.task.data.held_out
    run.engine.eval()
    with torch.no_grad():
        for index in range(EVAL_SEQUENCES):
            run.engine(input_ids=held_out.batch([index])["input_ids"])
    return {
        "mask": torch.cat(masks),
        "kinds": held_out.batch(range(EVAL_SEQUENCES))["token_kinds"].flatten(),
        "parameters": run.parameter_count,
        "flops": run.flop_count,
        "observables": run.engine.observables(),
    }


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    return run_dir, run_ranks(_train, 1, _config(run_dir))[0]


def test_evaluation_logs_what_a_loop_over_the_masks_counts(one_rank):
    run_dir, facts = one_rank
    last = read_metrics(run_dir)[-1]
    chosen, per_expert = defaultdict(list), [0] * facts["mask"].shape[1]
    for row, kind in zip(facts["mask"].tolist(), facts["kinds"].tolist(), strict=True):
        chosen[KINDS[kind]].append(sum(row))
        per_expert = [count + taken for count, taken in zip(per_expert, row, strict=True)]
    everybody = chosen["even"] + chosen["odd"]
    assert last[f"eval/mean_k/{LAYER}"] == pytest.approx(sum(everybody) / len(everybody)) == last["eval/mean_k"]
    for kind, ks in chosen.items():
        assert last[f"eval/mean_k_per_kind/{kind}/{LAYER}"] == pytest.approx(sum(ks) / len(ks))
        assert last[f"eval/mean_k_per_kind/{kind}"] == pytest.approx(sum(ks) / len(ks))
    assert last[f"eval/busiest_share/{LAYER}"] == pytest.approx(max(per_expert) / len(everybody))
    assert 0 < last[f"eval/load_entropy/{LAYER}"] < 1
    assert {line["step"] for line in read_metrics(run_dir) if "eval/mean_k" in line} == {3, 6}


def test_every_log_line_tells_of_layers_kinds_controllers_and_cost(one_rank):
    run_dir, facts = one_rank
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    parameters, flops = facts["parameters"], facts["flops"]
    for line in lines:
        mean_k = {LAYER: line[f"moe/mean_k/{LAYER}"]}
        live = {LAYER: int(line[f"moe/live_experts/{LAYER}"])}
        assert line["moe/active_parameters"] == pytest.approx(parameters.active_per_token(mean_k, live))
        assert line["moe/forward_flops_per_token"] == pytest.approx(flops.forward(mean_k))
        assert line["moe/training_flops_per_token"] == pytest.approx(3 * line["moe/forward_flops_per_token"])
        kinds = [line[f"moe/mean_k_per_kind/{kind}/{LAYER}"] for kind in KINDS]
        assert min(kinds) <= mean_k[LAYER] <= max(kinds)
        assert 0 <= line[f"moe/load_entropy/{LAYER}"] <= 1
        assert line[f"moe/controller/budget_target/{LAYER}"] == 2.0
    assert lines[-1][f"moe/controller/budget_control/{LAYER}"] == facts["observables"][LAYER]["budget_control"]
    assert len({line[f"moe/live_experts/{LAYER}"] for line in lines}) > 1, "the example must grow or prune an expert"


def test_another_layout_says_the_same(one_rank, tmp_path):
    """Two ranks, one sequence each at a time: repeats fall on other ranks and in other batches."""
    parallel = {"parallel__num_ranks": 2, "parallel__ep_size": 2, "parallel__activation_checkpointing": "torch"}
    batches = {"training__micro_batch_size": 1, "training__gradient_accumulation_steps": 2}
    config = _config(tmp_path / "run", **parallel, **batches, telemetry__detail="brief")
    run_ranks(_train, 2, config)
    for expected, line in zip(read_metrics(one_rank[0]), read_metrics(tmp_path / "run"), strict=True):
        kinds = ("sent_row_bytes", "least_row_bytes", "sent_metadata_bytes")
        sent, least, _ = between_ranks = [f"moe/{kind}_per_token" for kind in kinds]
        between_ranks += ["moe/rank_imbalance", f"moe/rank_imbalance/{LAYER}"]
        measured_on_demand = {name for name in expected if "/controller/" in name or name == "train/compute_time_s/0"}
        assert len(measured_on_demand) > 1
        assert expected.keys() - measured_on_demand | set(between_ranks) == line.keys()
        assert not expected.keys() & set(between_ranks)
        assert line[sent] == pytest.approx(line[least]) and line[least] > 0
        for name, value in expected.items():
            if name.partition("/")[0] in ("moe", "eval") and name not in measured_on_demand:
                assert line[name] == pytest.approx(value, rel=1e-4), name


PLACEMENTS = {name: Placement(expert_ids=(0, 1, None), next_id=2, ep_size=1) for name in ("a", "b")}


def _loads(kinds_of_b: list[float]) -> ExpertLoads:
    """Mean k 1.5 in layer `a` and 0.5 in `b`; kinds: 4 and 4 tokens in `a` with 4 and 8 experts."""
    return _loads_of({"a": ([4.0, 4.0], [4.0, 8.0]), "b": (kinds_of_b, [4.0, 0.0])})


def _loads_of(statistics: dict[str, tuple[list[float], list[float]]]) -> ExpertLoads:
    """statistics: by layer the tokens and the chosen experts of every kind."""
    loads = ExpertLoads()
    for layer, (tokens, assignments) in statistics.items():
        zero = RoutingRecords.zeros(3, 2, {}, torch.device("cpu"))
        record = replace(
            zero,
            num_tokens=torch.tensor(int(sum(tokens))),
            num_assignments=torch.tensor(int(sum(assignments))),
            statistics={
                "tokens_per_kind": torch.tensor(tokens),
                "assignments_per_kind": torch.tensor(assignments),
                "tokens_of_undeclared_kind": torch.tensor(0.0),
                "passes_with_misshapen_kinds": torch.tensor(0.0),
            },
        )
        loads.add({layer: record}, PLACEMENTS)
    return loads


def _values(metrics: list[Any]) -> dict[str, float]:
    return {metric.name: metric.value for metric in metrics}


def test_kinds_are_averaged_over_the_layers_that_saw_them():
    assert _values(kind_metrics("eval", _loads([8.0, 0.0]), KINDS)) == {
        "eval/mean_k_per_kind/even/a": 1.0,
        "eval/mean_k_per_kind/even/b": 0.5,
        "eval/mean_k_per_kind/even": 0.75,
        "eval/mean_k_per_kind/odd/a": 2.0,
        "eval/mean_k_per_kind/odd": 2.0,
    }
    assert kind_metrics("moe", ExpertLoads(), KINDS) == [] == kind_metrics("moe", _loads([8.0, 0.0]), ())


def test_modalities_and_questions_are_taken_together_token_by_token():
    """Image tokens of `sum`: 10 with 30 experts in layer `a`; none of `text`, which is asked without images."""
    kinds = token_kinds_of(["sum", "text"])
    assert kinds == ("text", "image", "text sum", "image sum", "text text", "image text")
    tokens = [10.0, 30.0, 20.0, 10.0, 10.0, 0.0]
    chosen = {"a": [10.0, 60.0, 60.0, 30.0, 10.0, 0.0], "b": [20.0, 30.0, 50.0, 10.0, 50.0, 0.0]}
    found = _values(kind_metrics("moe", _loads_of({layer: (tokens, of) for layer, of in chosen.items()}), kinds))
    assert found["moe/mean_k_per_kind/image sum"] == (30 / 10 + 10 / 10) / 2
    assert {name: value for name, value in found.items() if "per_kind" not in name} == {
        "moe/mean_k_per_modality/text": (80 / 40 + 120 / 40) / 2,
        "moe/mean_k_per_modality/image": (90 / 40 + 40 / 40) / 2,
        "moe/mean_k_per_question/sum": (90 / 30 + 60 / 30) / 2,
        "moe/mean_k_per_question/text": (10 / 10 + 50 / 10) / 2,
    }


def test_cost_follows_the_measured_mean_k_and_the_live_experts():
    parameters = ParameterCount(
        in_slots=0,
        live=0,
        live_without_experts=1000,
        num_live={"a": 2, "b": 1},
        per_expert={"a": 100, "b": 10},
        per_router_row={"a": 5, "b": 3},
    )
    flops = FlopCount(linear=50, attention=5, routers=1, per_expert={"a": 20, "b": 2})
    costs = (PLACEMENTS, parameters, flops)
    # `b` has one expert more than when the parameters were counted.
    expected = {"active_parameters": 1000 + 150 + 5 + 3, "forward_flops_per_token": 56 + 30 + 1}
    assert _values(cost_metrics("eval", _loads([8.0, 0.0]), *costs)) == {f"eval/{k}": v for k, v in expected.items()}
    training = {f"moe/{k}": v for k, v in expected.items()} | {"moe/training_flops_per_token": 3 * 87}
    assert _values(cost_metrics("moe", _loads([8.0, 0.0]), *costs)) == training
    assert cost_metrics("moe", ExpertLoads(), *costs) == [] == cost_metrics("eval", ExpertLoads(), *costs)


def test_a_dense_model_costs_all_it_has_at_evaluations():
    none = {"num_live": {}, "per_expert": {}, "per_router_row": {}}
    parameters = ParameterCount(in_slots=1000, live=1000, live_without_experts=1000, **none)
    costs = ({}, parameters, FlopCount(linear=50, attention=5, routers=0, per_expert={}))
    expected = {"eval/active_parameters": 1000, "eval/forward_flops_per_token": 55}
    assert _values(cost_metrics("eval", ExpertLoads(), *costs)) == expected
    assert cost_metrics("moe", ExpertLoads(), *costs) == []


def test_imbalance_is_that_of_the_busiest_rank_of_every_layer():
    """Layer `a`: 6 and 2 rows on two ranks before an expert moves, 3 and 5 after; layer `b`: 9 and 3."""
    loads = ExpertLoads()
    before = {name: Placement(expert_ids=(0, 1, 2, None), next_id=3, ep_size=2) for name in ("a", "b")}
    after = {name: Placement(expert_ids=(0, None, 2, 1), next_id=3, ep_size=2) for name in ("a", "b")}
    for placements, counts in ((before, {"a": [1, 5, 2, 0], "b": [8, 1, 3, 0]}), (after, {"a": [3, 0, 1, 4]})):
        zero = RoutingRecords.zeros(4, 2, {}, torch.device("cpu"))
        loads.add({name: replace(zero, tokens_per_slot=torch.tensor(of)) for name, of in counts.items()}, placements)
    assert _values(rank_metrics(loads)) == {
        "moe/rank_imbalance/a": 9 / 8,
        "moe/rank_imbalance/b": 9 / 6,
        "moe/rank_imbalance": (9 + 9) / (8 + 6),
    }
    assert rank_metrics(ExpertLoads()) == [] == rank_metrics(_loads([8.0, 0.0])), "one rank has all experts"


def test_pools_and_controllers():
    assert _values(pool_metrics(PLACEMENTS, {"b": {"p": 0.4}})) == {
        "moe/live_experts/a": 2,
        "moe/live_experts/b": 2,
        "moe/slots/a": 3,
        "moe/slots/b": 3,
        "moe/controller/p/b": 0.4,
    }
