"""The recipe `experiment=top_p_llama`: complete as it is committed, and run at a tiny size on shards of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import LlamaModelConfig, RunConfig
from dynmoe_ds.data import train_tokenizer, write_token_shards
from dynmoe_ds.models import build_decoder, count_parameters
from dynmoe_ds.routing import TopPConfig
from dynmoe_ds.telemetry import read_metrics
from dynmoe_ds.training import Trainer

VOCAB_SIZE, STEPS = 300, 8
LAYERS = ("model.layers.0.mlp", "model.layers.2.mlp")
TINY = (
    "model.hidden_size=32", "model.num_layers=4", "model.num_heads=2", "model.dense_ffn_hidden_size=48",
    "model.expert_ffn_hidden_size=48", "data.sequence_length=16", "data.held_out_windows=8", "optim.warmup_steps=2",
    "optim.lr=1e-2", "training.micro_batch_size=2", "training.gradient_accumulation_steps=2", f"training.steps={STEPS}",
    "training.log_every_steps=4", "training.eval_every_steps=4", "training.eval_sequences=8", "telemetry=disabled",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"{number} times 7 is {number * 7}.\n" for number in range(200))
    (folder / "text.txt").write_text(text)
    tokenizer = train_tokenizer([text], VOCAB_SIZE)
    write_token_shards([folder / "text.txt"], folder / "shards", tokenizer=tokenizer, tokens_per_shard=500)
    return folder / "shards"


def _recipe(shards: Path, run_dir: Path | str, *overrides: str) -> RunConfig:
    return load_config(["experiment=top_p_llama", f"data.path={shards}", f"run_dir={run_dir}", *overrides])


def test_the_recipe_says_what_the_paper_says(shards: Path) -> None:
    """The values of issue and paper, written out once more."""
    config = _recipe(shards, "runs/never-made-by-a-test")
    model, optim, training = config.model, config.optim, config.training
    assert isinstance(model, LlamaModelConfig)
    assert (model.num_layers, model.hidden_size, model.num_experts) == (24, 1024, 16)
    assert list(model.moe_layers()) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
    assert config.router == TopPConfig(p=0.4, renormalize=False, load_balance_weight=1e-2, entropy_weight=1e-4)
    assert config.adaptation is None
    assert (optim.beta1, optim.beta2, optim.weight_decay) == (0.9, 0.95, 0.1)
    assert (optim.lr, optim.lr * optim.final_lr_fraction) == (3e-4, pytest.approx(3e-5))
    assert config.data.sequence_length == 2048
    sequences = training.micro_batch_size * training.gradient_accumulation_steps * config.parallel.num_ranks
    assert sequences * 2048 * training.steps == pytest.approx(100e9, rel=1e-5)


def _by_arithmetic(model: LlamaModelConfig, vocab_size: int) -> tuple[int, int, int]:
    """Parameters without any expert, of one expert, and per row of a router."""
    width = model.hidden_size
    num_moe = len(model.moe_layers())
    attention_and_norms = 4 * width**2 + 2 * width
    dense_ffns = (model.num_layers - num_moe) * 3 * width * model.dense_ffn_hidden_size
    embeddings = (1 if model.tie_embeddings else 2) * vocab_size * width
    without = embeddings + model.num_layers * attention_and_norms + width + dense_ffns
    return without, 3 * width * model.expert_ffn_hidden_size, width


def test_the_parameters_are_as_many_as_the_paper_s(shards: Path) -> None:
    """The arithmetic holds for a tiny model that is built; for the recipe it gives the paper's dense 374M at k = 1."""
    tiny = _recipe(shards, "runs/never-made-by-a-test", *TINY, "parallel=single")
    without, per_expert, per_row = _by_arithmetic(tiny.model, VOCAB_SIZE)
    count = count_parameters(build_decoder(tiny, VOCAB_SIZE, eos_token_id=0), ep_size=1)
    assert count.live == without + 2 * 16 * (per_expert + per_row)
    assert count.active_per_token(dict.fromkeys(LAYERS, 1.5)) == without + 2 * (16 * per_row + 1.5 * per_expert)

    full = _recipe(shards, "runs/never-made-by-a-test").model
    without, per_expert, per_row = _by_arithmetic(full, vocab_size=32_000)
    assert without + 12 * per_expert == pytest.approx(374e6, abs=0.5e6)
    assert without + 12 * 16 * (per_expert + per_row) == pytest.approx(1.93e9, abs=0.005e9)
    assert without + 12 * (1.76 * per_expert + 16 * per_row) == pytest.approx(453e6, abs=0.5e6)


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    Trainer(config).run()


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [(1, ["parallel=single"]), (2, ["parallel.num_ranks=2", "parallel.ep_size=2"])],  # the second in bfloat16
)
def test_a_tiny_run_learns_and_reports(shards: Path, tmp_path: Path, num_ranks: int, parallel: list[str]) -> None:
    run_dir = tmp_path / "run"
    config = _recipe(shards, run_dir, *TINY, *parallel)
    run_ranks(_train, num_ranks, config, timeout_s=120)
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == [4, 8]
    assert lines[1]["eval/loss"] < lines[0]["eval/loss"] < 6
    without, per_expert, per_row = _by_arithmetic(config.model, VOCAB_SIZE)
    for line in lines:
        assert line["train/tokens_seen"] == line["step"] * 4 * 16 * num_ranks
        for group in ("moe", "eval"):
            mean_k = [line[f"{group}/mean_k/{layer}"] for layer in LAYERS]
            # A flat softmax over 16 experts reaches 0.4 with 7 of them, so a token takes 7 at most.
            assert all(1 <= k <= 7 for k in mean_k)
            assert line[f"{group}/mean_k"] == pytest.approx(sum(mean_k) / 2)
            active = without + 2 * 16 * per_row + sum(mean_k) * per_expert
            assert line[f"{group}/active_parameters"] == pytest.approx(active, rel=1e-12)
    page = (run_dir / "report.html").read_text()
    for words in ("Experts per token by layer", "training tokens seen", "active parameters per token, last"):
        assert words in page
    assert (run_dir / "tokenizer" / "tokenizer.json").is_file()
    assert not (run_dir / "sample.txt").exists()
