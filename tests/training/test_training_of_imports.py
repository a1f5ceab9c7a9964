"""Published models can be trained on, by the command in the docs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.no_report import draw_no_report
from tests.helpers.published import BUILD, published_config, published_tensors, tower, write_published, write_tower
from tests.helpers.recipe_parts import write_recipe_parts
from tests.helpers.spawn import run_ranks

import dynmoe_ds as dm
from dynmoe_ds.cli.main import main
from dynmoe_ds.config.load import load_config
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.models.vision_language import take_conversations
from dynmoe_ds.moe import moe_layers
from dynmoe_ds.training import Trainer
from dynmoe_ds.training.tasks import VisionLanguage

LAYERS = tuple(f"model.language_model.layers.{index}.mlp" for index in (0, 2))
# Live ones in the checkpoint, of ids below 4, and the temperatures that it has learnt.
LIVE, TEMPERATURES = ((0, 2, 3), (1, 3)), (1.0, math.exp(1.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`imported`, a published model after `dynmoe import`, and what a user has beside it."""
    folder = write_recipe_parts(tmp_path_factory.mktemp("imports") / "parts", "stablelm").parent
    sizes = {"vocab_size": 400, "max_position_embeddings": 512}
    published = write_published(
        folder / "published", published_tensors("stablelm", **sizes), published_config("stablelm", **sizes)
    )
    write_tower(folder / "clip", tower())
    BUILD["stablelm"](**sizes).config.save_pretrained(folder / "decoder")
    parts = ["--tokenizer", f"{folder}/parts/stablelm", "--vision-tower", f"{folder}/clip"]
    assert main(["import", f"{published}", f"{folder}/imported", *parts]) == 0
    return folder


def overrides(folder: str | Path, *more: str) -> list[str]:
    """Those in the docs; then sizes, steps, a split after the last, and what is for long runs."""
    return [
        "experiment=moe_llava_stablelm", "stage=experts", f"stage.start={folder}/imported/model",
        "router=top_any_authors_code", f"model.vision_pretrained={folder}/clip",
        f"model.text_pretrained={folder}/decoder", f"data.tokenizer={folder}/parts/stablelm",
        f"data.image_folder={folder}/parts/images", f"data.path={folder}/parts/mix.json",
        f"data.held_out_path={folder}/parts/held_out.json", "model.num_slots=6", f"run_dir={folder}/run",
        "data.image_size=8", "data.sequence_length=512", "data.num_workers=0", "training.micro_batch_size=2",
        "training.log_every_steps=1", "training.steps=2", "optim.lr=1e-2", "optim.warmup_steps=0", "telemetry=disabled",
        "parallel.dtype=float32", "adaptation.rule=split_all", "adaptation.every_steps=2", "adaptation.window_steps=1",
        *more,
    ]  # fmt: skip


def train_on(rank: int, world_size: int, folder: str) -> float:
    """Two steps with a split of all experts; the loss of this rank's first batch by the imported model itself."""
    draw_no_report()
    trainer = Trainer(load_config(overrides(folder, "parallel.num_ranks=2", "parallel.ep_size=2")))
    imported: Any = dm.load_model(f"{folder}/imported/model").train()
    take_conversations(imported)
    batch = {name: value for name, value in trainer.loader.batch(0, 0).items() if name != "token_kinds"}
    with torch.no_grad():
        loss = imported(**batch).loss
    trainer.run()
    return float(loss)


def test_an_imported_model_is_trained_on_two_ranks_and_its_experts_split(folder: Path) -> None:
    before = dm.load_model(folder / "imported" / "model")
    assert tuple(layer.placement.live_ids for layer in moe_layers(before).values()) == LIVE
    losses = run_ranks(train_on, 2, f"{folder}", timeout_s=200)
    first, last = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["train/loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert math.isfinite(last["train/loss"]) and math.isfinite(last["eval/loss"])
    after = dm.load_model(folder / "run" / "model")
    layers = moe_layers(after)
    assert tuple(layers) == LAYERS
    for layer, source, live, temperature in zip(
        layers.values(), moe_layers(before).values(), LIVE, TEMPERATURES, strict=True
    ):
        assert layer.router.config.temperature == pytest.approx(temperature)
        new = range(4, 4 + len(live))
        assert layer.placement.live_ids == (*live, *new), "ids of experts that were masked are not used again"
        for id_ in live:
            was, is_now = (one.experts.w1[one.placement.slots_by_id[id_]] for one in (source, layer))
            assert not torch.equal(was, is_now), "trained"
    frozen, trained = (model.model.multi_modal_projector.linear_1.weight for model in (before, after))
    assert torch.equal(frozen, trained)


def test_temperatures_are_the_models_unless_another_is_set(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    alone = ["parallel.num_ranks=1", "parallel.ep_size=1"]
    with caplog.at_level("INFO", "dynmoe_ds"):
        model = VisionLanguage(load_config(overrides(folder, *alone))).build_model()
    assert tuple(layer.router.config.temperature for layer in moe_layers(model).values()) == pytest.approx(TEMPERATURES)
    assert f"The routers keep the temperatures that they have in {folder}/imported/model: 1, 4.482" in caplog.text
    for other in ("router.temperature=2", "router.diversity_weight=0.5"):
        with pytest.raises(ConfigError, match=r"whose routers are TopAnyConfig.*but the section router says TopAnyCon"):
            VisionLanguage(load_config(overrides(folder, *alone, other))).build_model()
