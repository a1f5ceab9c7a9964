"""TP 2 x DP 2 with EP 2 on megatron-core's layers equals one rank on plain torch; other layouts are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import dynmoe_ds as dm
from dynmoe_ds.errors import CheckpointError, ConfigError, DynMoEError
from dynmoe_ds.integrations.megatron import MegatronGroups, megatron_module
from tests.helpers.megatron import needs_megatron
from tests.helpers.megatron_gpt import train_gpt
from tests.helpers.models import deepspeed_config, gathered
from tests.helpers.spawn import run_ranks

WIDTH, HEADS, WORDS = 16, 4, 32
# Five tokens each: the 15 of a data-parallel rank cannot be shared by two without one token of padding.
SEQUENCES, LENGTH = 6, 5
STEPS = 4
FLOAT32 = 5e-6
# Clipping is tight enough to act. SGD shows errors of scale that Adam hides.
SETTINGS: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"stage": 0, "kind": "SGD", "lr": 0.3, "clip": 0.3},
    "ZeRO-1": {"stage": 1, "kind": "SGD", "lr": 0.3, "clip": 0.3},
    "ZeRO-2, accumulated": {"stage": 2, "kind": "SGD", "lr": 0.3, "clip": 0.3, "accumulate": 2},
    "ZeRO-3": {"stage": 3, "kind": "SGD", "lr": 0.3, "clip": 0.3},
    "ZeRO-1, AdamW": {"stage": 1},
}


def _weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = {"words": (WORDS, WIDTH), "qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "head": (WORDS, WIDTH)}
    return {name: torch.randn(shape, generator=g) / WIDTH**0.5 for name, shape in shapes.items()}


# Along which dimension. Heads are rows of qkv, so that a shard has whole ones.
SHARDS = {"words": 0, "qkv": 0, "out": 1, "head": 0}


class Model(nn.Module):
    """Embedding, causal attention, experts and a head; gives the mean cross entropy of the next token."""

    def __init__(self, ep_size: int, mpu: Any = None, tp_group: Any = None) -> None:
        super().__init__()
        weights = _weights()
        self.tp_size = 1 if mpu is None else mpu.get_model_parallel_world_size()
        if mpu is None:
            self.words, self.qkv = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.out, self.head = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WORDS, bias=False)
        else:
            layers = megatron_module("tensor_parallel", "this test")
            config = megatron_module("model_parallel_config", "this test").ModelParallelConfig(
                tensor_model_parallel_size=self.tp_size, use_cpu_initialization=True
            )
            shared = {"config": config, "init_method": nn.init.normal_}
            column = {**shared, "bias": False, "gather_output": False}
            self.words = layers.VocabParallelEmbedding(WORDS, WIDTH, **shared)
            self.qkv = layers.ColumnParallelLinear(WIDTH, 3 * WIDTH, **column)
            self.out = layers.RowParallelLinear(
                WIDTH, WIDTH, bias=False, input_is_parallel=True, skip_bias_add=True, **shared
            )
            self.head = layers.ColumnParallelLinear(WIDTH, WORDS, **column)
            self.cross_entropy = layers.vocab_parallel_cross_entropy
            weights = {
                name: w.chunk(self.tp_size, SHARDS[name])[mpu.get_model_parallel_rank()] for name, w in weights.items()
            }
        for name, weight in weights.items():
            self.get_parameter(f"{name}.weight").data.copy_(weight)
        self.norm = nn.LayerNorm(WIDTH)
        # Losses of weights alone: those of a rank's tokens depend on which tokens a rank has.
        self.moe = dm.MoELayer(
            hidden_size=WIDTH, ffn_hidden_size=24, num_experts=4, num_slots=8, ep_size=ep_size, tp_group=tp_group,
            router=dm.TopAnyConfig(diversity_weight=0.1, simplicity_weight=0.1), seed=11,
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L + 1]."""
        hidden = self.words(ids[:, :-1])
        heads = _plain(self.qkv(hidden)).unflatten(-1, (HEADS // self.tp_size, 3, WIDTH // HEADS))
        query, key, value = heads.transpose(1, 2).unbind(3)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + _plain(self.out(mixed))
        hidden = hidden + self.moe(self.norm(hidden))
        logits = _plain(self.head(hidden))
        if self.tp_size == 1:
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss: Tensor = self.cross_entropy(logits, ids[:, 1:]).mean()
        return loss


def _plain(output: Any) -> Tensor:
    """Without the bias that Megatron's layers give beside their output."""
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _train(mpu: Any, setting: dict[str, Any]) -> dict[str, Any]:
    part, parts = (0, 1) if mpu is None else (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size())
    model = Model(2 if mpu else 1, mpu, None if mpu is None else mpu.get_model_parallel_group())
    adaptation = dm.AdaptationConfig(every_steps=2, window_steps=2)
    engine = dm.initialize(model, deepspeed_config(**setting), adaptation, mpu=mpu)
    g = torch.Generator().manual_seed(5)
    losses, norms, records = [], [], []
    for _ in range(STEPS):
        for _ in range(setting.get("accumulate", 1)):
            ids = torch.randint(WORDS, (SEQUENCES, LENGTH + 1), generator=g)
            loss = engine(ids.chunk(parts)[part])
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(float(mean) / dist.get_world_size())
        norms.append(engine.gradient_norm())
        found = engine.take_records()["moe"]
        loads = {i: int(found.tokens_per_slot[s]) for i, s in engine.placements()["moe"].slots_by_id.items()}
        records.append((found.num_tokens, found.num_assignments, found.num_unrouted, loads))
    weights = gathered(engine)
    if mpu is not None:
        for name, dim in SHARDS.items():
            shards = [torch.empty_like(weights[f"{name}.weight"]) for _ in range(model.tp_size)]
            dist.all_gather(shards, weights[f"{name}.weight"], group=mpu.get_model_parallel_group())
            weights[f"{name}.weight"] = torch.cat(shards, dim)
    engine.eval()
    with torch.no_grad():
        held_out = engine(torch.randint(WORDS, (2, LENGTH + 1), generator=g))
    return {
        "losses": losses, "norms": norms, "records": records, "weights": weights, "held_out": float(held_out),
        "traffic": engine.take_traffic(),
    }  # fmt: skip


def _one_rank(rank: int, world_size: int) -> dict[str, Any]:
    trained = {name: _train(None, setting) for name, setting in SETTINGS.items()}
    megatron_module("parallel_state", "this test").initialize_model_parallel()
    return {"trained": trained, "gpt": train_gpt(ep_size=1, tp_size=1)}


def _four_ranks(rank: int, world_size: int) -> dict[str, Any]:
    state = megatron_module("parallel_state", "this test")
    messages = {"not initialised": _message(MegatronGroups)}
    state.initialize_model_parallel(tensor_model_parallel_size=2)
    mpu = MegatronGroups()
    trained = {name: _train(mpu, setting) for name, setting in SETTINGS.items()}
    gpt = train_gpt(ep_size=2, tp_size=2)
    return {"trained": trained, "gpt": gpt, "messages": messages | _refused(mpu)}


def _refused(mpu: MegatronGroups) -> dict[str, str]:
    """What is said of every layout that DeepSpeed would train wrongly, without an error of its own."""
    from deepspeed.utils import groups

    tp_group, config = mpu.get_model_parallel_group(), deepspeed_config(1)

    class Swapped(MegatronGroups):
        """Ranks with the same tokens far apart."""

        def get_model_parallel_group(self) -> Any:
            return mpu.get_data_parallel_group()

        def get_data_parallel_group(self) -> Any:
            return mpu.get_model_parallel_group()

    class Pipelined(MegatronGroups):
        """Other ranks than those of the lane have other data."""

        def get_data_parallel_group(self) -> Any:
            return dist.group.WORLD

    differing = Model(2, mpu, tp_group)
    differing.norm.weight.data.add_(dist.get_rank(tp_group) * 1e-3)
    unmarked = Model(2, mpu, tp_group)
    unmarked.out.weight.tensor_model_parallel = False  # type: ignore[union-attr]
    elastic = dm.AdaptationConfig(every_steps=2, window_steps=2, pool="elastic", max_slots=16)
    engine = dm.initialize(Model(2, mpu, tp_group), config, mpu=mpu)
    messages = {
        "no tp_group": _message(lambda: dm.initialize(Model(2, mpu), config, mpu=mpu)),
        "no mpu": _message(lambda: dm.initialize(Model(2, mpu, tp_group), config)),
        "swapped": _message(lambda: dm.initialize(Model(2, mpu, tp_group), config, mpu=Swapped())),
        "pipelined": _message(lambda: dm.initialize(Model(2, mpu, tp_group), config, mpu=Pipelined())),
        "tp_group of strangers": _message(lambda: Model(2, mpu, mpu.get_data_parallel_group())),
        "ep over lanes": _message(lambda: Model(4, mpu, tp_group)),
        "differing": _message(lambda: dm.initialize(differing, config, mpu=mpu)),
        "unmarked": _message(lambda: dm.initialize(unmarked, config, mpu=mpu)),
        "elastic": _message(lambda: dm.initialize(Model(2, mpu, tp_group), config, elastic, mpu=mpu)),
        "checkpoint": _message(lambda: engine.save_checkpoint("never-made-by-a-test")),
        "load": _message(lambda: engine.load_checkpoint("never-made-by-a-test")),
        "resize": _message(lambda: engine.resize_slots(16)),
        "export": _message(lambda: dm.save_model(engine, "never-made-by-a-test")),
        "kinds": _message(lambda: _with_kinds(Model(2, mpu, tp_group))),
    }
    for how, make in {
        "legacy": lambda: groups._create_expert_and_data_parallel(2),
        "tp": lambda: groups._create_expert_and_data_parallel(2, mp_size=2, mp_mode="tp"),
    }.items():
        groups._EXPERT_PARALLEL_GROUP.clear()
        groups._EXPERT_DATA_PARALLEL_GROUP.clear()
        make()
        messages[how] = _message(lambda: dm.initialize(Model(2, mpu, tp_group), config, mpu=mpu))
    return messages


def _with_kinds(model: Model) -> None:
    with dm.StepLedger(num_kinds=1, token_kinds=torch.zeros(2, LENGTH, dtype=torch.int64)):
        model(torch.zeros(2, LENGTH + 1, dtype=torch.int64))


def _message(action: Any) -> str:
    with pytest.raises(DynMoEError) as caught:
        action()
    assert isinstance(caught.value, ConfigError | CheckpointError | dm.errors.RoutingError), caught.value
    return str(caught.value)


WITH_TP = "not work with tensor parallelism yet: a shard of a parameter would be taken for the whole."
MUST_BE = (
    "With tensor-parallel groups of 2 they must be [0, 2] and [0], or gradients and their norm are silently wrong."
)
MESSAGES = {
    "not initialised": "MegatronGroups needs the groups of megatron-core. Call megatron.core.parallel_state.",
    "no tp_group": "moe: the layer was built for tensor-parallel groups of 1 ranks, but initialize was given an mpu "
    "with tensor-parallel groups of 2: experts",
    "no mpu": "moe: the layer was built for tensor-parallel groups of 2 ranks, but initialize was given no mpu: ",
    "swapped": "The model-parallel group of mpu holds the ranks [0, 2] but must be of neighbours, as [0, 1], so ",
    "pipelined": "The data-parallel group of mpu holds the ranks [0, 1, 2, 3] but must be [0, 2]: all ranks at ",
    "tp_group of strangers": "tp_group holds the ranks [0, 2] but must be of neighbours, as [0, 1], so that ranks",
    "ep over lanes": "ep_size is 4 but must divide the 2 data-parallel ranks. Use 1 or 2.",
    "differing": "norm.weight differ between ranks with the same tokens. Set param.tensor_model_parallel = True on",
    "unmarked": "out.weight differ between ranks with the same tokens. Set param.tensor_model_parallel = True on",
    "elastic": "adaptation.pool is elastic, which does not work with tensor parallelism yet. Use fixed.",
    "checkpoint": f"Checkpoints do {WITH_TP}",
    "load": f"Checkpoints do {WITH_TP}",
    "resize": f"Pools of another size do {WITH_TP}",
    "export": "moe is in a model with tensor parallelism, which cannot be saved yet: a shard",
    "kinds": "Kinds of tokens cannot be counted yet where ranks share out their tokens (tp_group).",
    "legacy": "DeepSpeed has groups for ep_size 2 already: rank 0 shares experts with the ranks [0, 1], and has its "
    f"replicas on [0, 2]. {MUST_BE}",
    "tp": "DeepSpeed has groups for ep_size 2 already: rank 0 shares experts with the ranks [0, 2], and has its "
    f"replicas on [0, 1]. {MUST_BE}",
}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_four_ranks, 4, timeout_s=240)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(_one_rank, 1, timeout_s=120)[0]
    return result


@needs_megatron
def test_tensor_and_expert_parallel_training_equals_one_rank(
    ranks: list[dict[str, Any]], one_rank: dict[str, Any]
) -> None:
    for name, expected in one_rank["trained"].items():
        assert len(expected["records"][-1][3]) > 4, f"{name}: the pool did grow"
        assert max(expected["norms"]) > 0.3, f"{name}: clipping did act"
        for rank in ranks:
            actual = rank["trained"][name]
            assert actual["losses"] == pytest.approx(expected["losses"], abs=FLOAT32), name
            assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-4), name
            assert actual["records"] == expected["records"], f"{name}: each token counts once"
            assert actual["held_out"] == pytest.approx(expected["held_out"], abs=FLOAT32), name
            assert actual["weights"].keys() == expected["weights"].keys(), name
            for key, weight in expected["weights"].items():
                assert (actual["weights"][key] - weight).abs().max() <= FLOAT32, (name, key)


@needs_megatron
def test_a_gpt_model_with_layers_of_experts_trains_and_grows_alike(
    ranks: list[dict[str, Any]], one_rank: dict[str, Any]
) -> None:
    expected = one_rank["gpt"]
    for layer in ("model.decoder.layers.0.mlp", "model.decoder.layers.1.mlp"):
        assert [len(live[layer]) for live in expected["live"]] == [3, 3, 4, 4, 4, 4]
    for rank in ranks:
        assert rank["gpt"]["losses"] == pytest.approx(expected["losses"], abs=FLOAT32)
        assert rank["gpt"]["norm"] == pytest.approx(expected["norm"], rel=1e-4)
        assert rank["gpt"]["live"] == expected["live"]


@needs_megatron
def test_no_row_travels_without_need(ranks: list[dict[str, Any]]) -> None:
    """The counters know which rank of a lane they are on: rows sent are the fewest, over a lane."""
    for name in SETTINGS:
        for lane in (ranks[0::2], ranks[1::2]):
            traffic = [rank["trained"][name]["traffic"]["moe"] for rank in lane]
            sent, least = sum(t.sent.row_bytes for t in traffic), sum(int(t.least_row_bytes) for t in traffic)
            assert sent == least > 0, name


@needs_megatron
def test_layouts_that_would_train_wrongly_are_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["messages"].keys() == MESSAGES.keys()
    for name, start in MESSAGES.items():
        assert ranks[0]["messages"][name].startswith(start), ranks[0]["messages"][name]
        assert all(name in rank["messages"] for rank in ranks)
