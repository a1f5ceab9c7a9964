"""Trained models on disk: what is in the files, and that they load into the same model on any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Grow, Move, Plan, Prune
from dynmoe_ds.config.deepspeed_json import to_deepspeed
from dynmoe_ds.errors import CheckpointError, ConfigError, DynMoEError
from dynmoe_ds.models import build_decoder
from dynmoe_ds.routing import router_config, router_names
from dynmoe_ds.routing.top_k import TopKConfig
from tests.helpers.models import TinyModel, gathered
from tests.helpers.reference import assert_near
from tests.helpers.run_config import small_run
from tests.helpers.spawn import run_ranks

VOCAB = 50
LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")
LIVE = (1, 2, 3, 4)  # of experts 0 to 3: 0 is pruned, 4 is born, 2 is moved
# EP, ZeRO stage, dtype, kind of expert. EP x EDP is the four ranks.
# Each size and each stage comes with both dtypes.
CASES = [
    (ep_size, stage, ("float32", "bfloat16")[(stage + row) % 2], "gelu" if ep_size == 2 else "swiglu")
    for row, ep_size in enumerate((1, 2, 4))
    for stage in (0, 1, 2, 3)
]


def token_ids(seed: int) -> Tensor:
    return torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(seed))


def decoder(ep_size: int = 1, **values: Any) -> LlamaForCausalLM:
    values = {"router": dm.TopAnyConfig.recommended()} | values
    config = small_run(model__moe_every=1, parallel__ep_size=ep_size, **values)
    return build_decoder(config, VOCAB, eos_token_id=0)


def engine_of(ep_size: int, stage: int, dtype: str, expert: str, seed: int = 0) -> Any:
    config = small_run(parallel__zero_stage=stage, parallel__dtype=dtype, optim__lr=1e-2)
    settings = to_deepspeed(config)
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or so small ones are never split
    adaptation = dm.AdaptationConfig(every_steps=100, window_steps=100)
    return dm.initialize(decoder(ep_size, expert__kind=expert, seed=seed), settings, adaptation)


def train(engine: Any, steps: range, rank: int) -> list[float]:
    engine.train()
    losses = []
    for step in steps:
        ids = token_ids(1000 * rank + step)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def change_pools(engine: Any) -> None:
    items: list[Prune | Grow | Move] = []
    for layer in LAYERS:
        row = torch.randn(32, generator=torch.Generator().manual_seed(3))
        items += [
            Prune(layer=layer, expert_id=0),
            Move(layer=layer, expert_id=2, to_slot=0),
            Grow(layer=layer, expert_id=4, slot=7, gate_row=row / row.norm(), seeding="copy_nearest", parent_id=3),
        ]
    engine.apply_plan(Plan(items=tuple(items)))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    return model(input_ids=token_ids(9)).logits.clone()


def expected_tensors(engine: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the file must hold, from the optimiser's float32 masters instead of the model. Collective."""
    found = {}
    for name, value in gathered(engine).items():
        if name.endswith("]"):  # layer.experts.w1[5] is layer.experts.5.w1 in the file
            path, _, expert_id = name[:-1].rpartition("[")
            owner, _, own = path.rpartition(".")
            name = f"{owner}.{expert_id}.{own}"
        found[name] = value.to(dtype)
    return found


def save_and_load(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    results = {}
    for case in CASES:
        ep_size, _, dtype, _ = case
        engine = engine_of(*case)
        train(engine, range(1), rank)
        change_pools(engine)
        train(engine, range(1, 2), rank)
        path = folder / "_".join(map(str, case))
        wanted = expected_tensors(engine, getattr(torch, dtype))
        dm.save_model(engine, path)
        assert path.is_dir(), "every rank finds the folder when save_model returns"
        results[case] = {
            "wanted": wanted,
            "trained": logits(engine),
            "same layout": logits(dm.load_model(path, ep_size=ep_size)),
            "another layout": logits(dm.load_model(path, ep_size=4 // ep_size, num_slots=8)),
        }
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[Any, Any]]:
    return run_ranks(save_and_load, 4, folder, timeout_s=240)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_the_file_holds_the_trained_weights_by_expert_id(case: Any, folder: Path, saved: Any) -> None:
    tensors, wanted = load_file(folder / "_".join(map(str, case)) / "model.safetensors"), saved[0][case]["wanted"]
    assert tensors.keys() == wanted.keys()
    assert {int(name.split(".")[5]) for name in tensors if ".mlp." in name} == set(LIVE)
    for name, value in wanted.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_every_layout_gives_the_logits_of_the_trained_model(case: Any, folder: Path, saved: Any) -> None:
    trained, loaded = saved[0][case]["trained"], dm.load_model(folder / "_".join(map(str, case)))
    assert_near(logits(loaded), trained, what="one rank")
    assert loaded.get_submodule(LAYERS[0]).placement.live_ids == LIVE
    assert loaded.get_submodule(LAYERS[0]).placement.next_id == 5
    for rank in saved:
        assert_near(rank[case]["same layout"], trained, what="same layout")
        assert_near(rank[case]["another layout"], trained, what="another layout")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A decoder without an engine, with the folder that holds it."""
    model, path = decoder(seed=5), tmp_path_factory.mktemp("one") / "deep" / "model"
    dm.save_model(model, path)
    return model, path


def test_the_manifest_is_readable_and_says_how_to_build_the_model(one: Any) -> None:
    model, path = one
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == "dynmoe_ds.model" and manifest["format_version"] == 1
    assert manifest["model_class"] == "LlamaForCausalLM"
    assert manifest["config"]["num_hidden_layers"] == 2 and manifest["config"]["vocab_size"] == VOCAB
    assert manifest["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    layer = manifest["layers"]["model.layers.1.mlp"]
    assert layer["router"]["name"] == "top_any_recommended" and layer["router"]["score"] == "softmax"
    del layer["router"]
    assert layer == {
        "hidden_size": 32,
        "ffn_hidden_size": 32,
        "expert": "swiglu",
        "expert_ids": [0, 1, 2, 3],
        "next_expert_id": 4,
        "seed": model.model.layers[1].mlp.seed,
        "has_shared": False,
        "shared_ffn_hidden_size": 0,
        "shared_is_gated": False,
    }
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "model.safetensors"]
    assert [file.name for file in path.parent.iterdir()] == ["model"], "nothing is left aside"


def test_a_loaded_model_is_whole(one: Any) -> None:
    model, path = one
    before = torch.get_rng_state()
    loaded = dm.load_model(path)
    assert torch.equal(before, torch.get_rng_state())
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_near(logits(loaded), logits(model))
    layer = loaded.model.layers[0].mlp
    assert layer.num_slots == 4 and layer.placement.live_ids == (0, 1, 2, 3)
    assert layer.seed == model.model.layers[0].mlp.seed


class _Written(TorchDispatchMode):
    """The sizes of everything that is computed outside of the meta device; memory that is only reserved is none."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not f"{func}".startswith("aten.empty"):
            self.sizes |= {
                part.numel() for part in pytree.tree_leaves(out) if isinstance(part, Tensor) and not part.is_meta
            }
        return out


def test_what_layers_replace_is_never_there(tmp_path: Path) -> None:
    """Nor are random values for the rest; what no file holds is as it is in a model that is built in memory."""
    own = decoder(model__hidden_size=32, model__dense_ffn_hidden_size=999).bfloat16()
    dm.save_model(own, tmp_path / "own")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCAB}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2)).eval()
    dm.save_model(dm.import_top_k_model(mixtral), tmp_path / "mixtral")
    for name, model, of_ffn in (("own", own, 32 * 999), ("mixtral", mixtral, 3 * (2 * 24) * 16)):
        with _Written() as written:
            loaded = dm.load_model(tmp_path / name)
        assert not any(param.is_meta for param in loaded.parameters())
        buffers = dict(loaded.named_buffers())
        assert buffers["model.rotary_emb.inv_freq"].dtype == torch.float32
        assert torch.equal(buffers["model.rotary_emb.inv_freq"], model.model.rotary_emb.inv_freq)
        with torch.no_grad():
            assert torch.equal(loaded(token_ids(0)).logits, model(token_ids(0)).logits)
        assert of_ffn not in written.sizes and written.sizes


def test_a_larger_pool_has_room_for_experts_with_new_ids(one: Any) -> None:
    loaded = dm.load_model(one[1], num_slots=12)
    layer = loaded.model.layers[0].mlp
    assert layer.placement.expert_ids == (0, None, None, 1, None, None, 2, None, None, 3, None, None)
    assert layer.placement.next_id == 4
    assert not layer.experts.w1[1].any() and not layer.router.weight[1].any()
    assert_near(logits(loaded), logits(one[0]))


def test_the_models_own_code_generates_from_a_loaded_model(one: Any) -> None:
    prompt = token_ids(1)[:1, :3]
    want = prompt
    with torch.no_grad():
        for _ in range(5):
            want = torch.cat([want, one[0](input_ids=want).logits[:, -1].argmax(1, keepdim=True)], 1)
    loaded = dm.load_model(one[1])
    got = loaded.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "router",
    [*map(router_config, router_names()), TopKConfig(bias_update_speed=0.01, num_null_experts=2)],
    ids=[*router_names(), "top_k with bias and null experts"],
)
def test_every_routers_state_comes_back(router: Any, tmp_path: Path) -> None:
    """Controllers live in buffers, some with an entry per slot, and keep their precision in a bfloat16 model."""
    model = decoder(router=router).bfloat16()
    generator = torch.Generator().manual_seed(1)
    for layer in (model.get_submodule(path) for path in LAYERS):
        layer.placement = layer.placement.without(1)
        for value in layer.router.state_dict().values():
            value += (0.1 * torch.rand(value.shape, generator=generator, dtype=torch.float64)).to(value.dtype)
    dm.save_model(model, tmp_path / "model")
    loaded = dm.load_model(tmp_path / "model")
    assert_near(logits(loaded), logits(model))
    for path in LAYERS:
        layer, mine = model.get_submodule(path), loaded.get_submodule(path)
        per_slot = {*layer.router.slot_parameters(), *layer.router.slot_buffers}
        for key, value in layer.router.state_dict().items():
            want = value[list(layer.placement.slots_by_id.values())] if key in per_slot else value
            got = mine.router.state_dict()[key]
            assert got.dtype == want.dtype and torch.equal(got, want), key


class Other(nn.Module):
    """No Hugging Face model: a linear layer with a buffer, and two layers whose pools differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(16)
        self.moe = TinyModel(1).moe


def test_any_module_is_saved_with_its_buffers(tmp_path: Path) -> None:
    model = Other()
    model.first.running_mean.fill_(0.5)
    dm.save_model(model, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    assert torch.equal(tensors["first.running_mean"], torch.full((16,), 0.5))
    assert torch.equal(tensors["moe.1.experts.2.w1"], model.moe[1].experts.w1[4])
    assert not any("active" in name or "expert_ids" in name for name in tensors)
    with pytest.raises(CheckpointError, match=r"manifest.json describes a Other, but load_model builds"):
        dm.load_model(tmp_path / "other")


def copied(path: Path, copy: Path) -> Path:
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def cut_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[:-100])


def edit(folder: Path, **values: Any) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_layer(folder: Path, **values: Any) -> None:
    layers = json.loads((folder / "manifest.json").read_text())["layers"]
    layers[LAYERS[1]] |= values
    edit(folder, layers=layers)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "{folder}/model.safetensors is missing, damaged or was cut off: .*not fully covered"),
        (lambda f: (f / "model.safetensors").unlink(), "{folder}/model.safetensors is missing, damaged or was cut off"),
        (cut_manifest, "{folder}/manifest.json is damaged or was cut off"),
        (lambda f: (f / "manifest.json").unlink(), "{folder}/manifest.json cannot be read: No such file or directory"),
        (lambda f: edit(f, format="zip"), "{folder}/manifest.json is no manifest of a model"),
        (
            lambda f: edit(f, format_version=2, dynmoe_ds_version="9.9"),
            r"{folder}/manifest.json has format version 2, but this dynmoe_ds reads version 1. Use the dynmoe_ds that "
            r"wrote it \(9.9\)",
        ),
        (lambda f: edit(f, layers=[]), "{folder}/manifest.json is damaged: AttributeError"),
        (
            lambda f: edit_layer(f, expert_ids=[0, 1, 2, 7]),
            "{folder}/model.safetensors does not belong to the manifest.json beside it: it lacks 5 tensors, such as "
            "model.layers.1.mlp.experts.7.w1",
        ),
        (
            lambda f: edit_layer(f, expert_ids=[0, 1, 2]),
            "{folder}/model.safetensors does not belong to the manifest.json beside it: it has too many tensors, such "
            "as model.layers.1.mlp.experts.3.w1",
        ),
        (
            lambda f: edit_layer(f, ffn_hidden_size=16),
            r"{folder}/model.safetensors does not belong .*: model.layers.1.mlp.experts.0.w1 has shape \[32, 32\], not "
            r"\[16, 32\]",
        ),
        (
            lambda f: edit_layer(f, router={"name": "top_nine"}),
            "{folder}/manifest.json: the router of model.layers.1.mlp cannot be built. router.name is 'top_nine'",
        ),
    ],
)
def test_what_cannot_be_loaded_names_the_file(damage: Any, message: str, one: Any, tmp_path: Path) -> None:
    copy = copied(one[1], tmp_path / "copy")
    damage(copy)
    with pytest.raises(CheckpointError, match=message.replace("{folder}", str(copy))):
        dm.load_model(copy)


def test_sizes_that_cannot_work_are_refused(one: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_slots is 3 but model\.layers\.0\.mlp has 4 experts\. Use 4 or more\."):
        dm.load_model(one[1], num_slots=3)
    with pytest.raises(ConfigError, match="ep_size is 2 but there is one data-parallel rank"):
        dm.load_model(one[1], ep_size=2)


def test_a_folder_in_use_is_left_alone(one: Any, tmp_path: Path) -> None:
    model, path = one
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        dm.save_model(model, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file exists and is not a folder"):
        dm.save_model(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*Not a directory.* Nothing is left of it."):
        dm.save_model(model, tmp_path / "file" / "model")
    (tmp_path / "empty").mkdir()
    dm.save_model(model, tmp_path / "empty")
    assert_near(logits(dm.load_model(tmp_path / "empty")), logits(model))


def test_experts_of_ranks_that_cannot_be_reached_are_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match="has ep_size 2 but torch"):
        dm.save_model(decoder(ep_size=2), tmp_path / "model")


def answer(attempt: Any) -> tuple[str, str]:
    try:
        attempt()
    except DynMoEError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def on_two_ranks(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return {"losses": losses_around_a_save(rank, folder), **faults_of_one_rank(rank, folder)}


def losses_around_a_save(rank: int, folder: Path) -> dict[Any, list[float]]:
    losses = {}
    for ep_size in (1, 2):
        for is_saved in (False, True):
            engine = engine_of(ep_size, 3, "float32", "swiglu")
            losses[ep_size, is_saved] = train(engine, range(2), rank)
            if is_saved:
                dm.save_model(engine, folder / str(ep_size))
            losses[ep_size, is_saved] += train(engine, range(2, 4), rank)
    return losses


def faults_of_one_rank(rank: int, folder: Path) -> dict[str, tuple[str, str]]:
    model = decoder(ep_size=2)
    answers = {"taken": answer(lambda: dm.save_model(model, folder))}
    if rank == 1:
        layer = model.model.layers[1].mlp
        layer.placement = layer.placement.without(3)
    answers["different"] = answer(lambda: dm.save_model(model, folder / "different"))
    # The other rank's folder holds nothing, as on a disk that the machines do not share.
    mine = folder / "whole" if rank == 0 else folder / "nothing"
    answers["missing"] = answer(lambda: dm.load_model(mine, ep_size=2))
    return answers


@pytest.fixture(scope="module")
def two_ranks(one: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    copied(one[1], folder / "whole")
    return folder, run_ranks(on_two_ranks, 2, folder)


def test_saving_changes_nothing_in_a_run_at_zero_3(two_ranks: Any) -> None:
    for rank in two_ranks[1]:
        for ep_size in (1, 2):
            assert rank["losses"][ep_size, True] == rank["losses"][ep_size, False]


def test_what_one_rank_finds_wrong_every_rank_reports(two_ranks: Any) -> None:
    folder, (first, second) = two_ranks
    assert first["taken"][0] == "CheckpointError"
    assert second["taken"][0] == "DivergenceError" and "rank 0: CheckpointError: " in second["taken"][1]
    for kind, message in (first["different"], second["different"]):
        assert kind == "DivergenceError"
        assert message.startswith(
            "The ranks disagree on the model to save. model.layers.1.mlp.expert_ids is [0, 1, 2, 3] on rank 0, "
            "[0, 1, 2] on rank 1."
        )
    assert not (folder / "different").exists()
    assert first["missing"][0] == "DivergenceError" and "rank 1: CheckpointError: " in first["missing"][1]
    assert second["missing"][0] == "CheckpointError" and "nothing/manifest.json" in second["missing"][1]
