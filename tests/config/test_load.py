"""Hydra's groups and the command line: misspelt words from either side, every committed option, and the round trip."""

from __future__ import annotations

import shutil
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from tests.helpers.vision_language import DATA, empty_files

from dynmoe_ds.config import groups, load
from dynmoe_ds.config.build import build
from dynmoe_ds.config.groups import config_groups
from dynmoe_ds.config.load import load_config, to_yaml
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import TopAnyConfig, router_config, router_names

RUN_DIR = "run_dir=runs/never-made-by-a-test"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DYNMOE_RUN_DIR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)


def faults_of(*overrides: str, config_name: str = "train") -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, config_name)
    return caught.value.faults


@pytest.fixture
def copied_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the committed tree that a test may damage, read in its place."""
    name = f"copied_configs_{tmp_path.name.replace('-', '_')}"
    shutil.copytree(str(files("dynmoe_configs")), tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(groups, "CONFIG_MODULE", name)
    monkeypatch.setattr(load, "CONFIG_MODULE", name)
    yield tmp_path / name
    sys.modules.pop(name, None)


# What an option of these needs beside itself.
_WITHOUT_SAMPLE = ["expert=gelu", "training.sample_tokens=0"]
_CLASSIFIERS = {
    "glue": ["model=bert_large", "model.pretrained=bert", "data.path=glue_data", *_WITHOUT_SAMPLE],
    "bert_large": ["data=glue", "model.pretrained=bert", "data.path=glue_data", *_WITHOUT_SAMPLE],
    "image_folder": ["model=vit_small", "data.path=images", *_WITHOUT_SAMPLE],
    "vit_small": ["data=image_folder", "data.path=images", *_WITHOUT_SAMPLE],
    "glue_bert_large": ["model.pretrained=bert", "data.path=glue_data"],
    "image_vit_small": ["data.path=images"],
}
_FOLDERS = ["model.vision_pretrained=clip", "model.text_pretrained=decoder"]
_VISION_LANGUAGE = {
    "model": ["data=llava", "stage=experts"],
    "data": ["model=llava_tiny", "stage=experts"],
    "stage": ["model=llava_tiny", "data=llava"],
    "experiment": ["stage=experts"],
}


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in config_groups().items() for o in options])
def test_every_committed_option_composes_and_validates(group: str, option: str, tmp_path: Path) -> None:
    overrides = [RUN_DIR, f"{group}={option}"]
    if group == "router":
        overrides.append("adaptation=split_all")  # the paper's growth is not for all of them
    if option == "text_file":
        (tmp_path / "book.txt").write_text("once")
        overrides.append(f"data.path={tmp_path}/book.txt")
    if option in ("token_shards", "top_p_llama"):
        (tmp_path / "index.json").write_text("{}")
        overrides.append(f"data.path={tmp_path}")
    if option == "megatron_indexed":
        for name in ("corpus.bin", "corpus.idx", "tokenizer.json"):
            (tmp_path / name).write_text("")
        overrides += [f"data.paths=[{tmp_path}/corpus]", f"data.tokenizer={tmp_path}/tokenizer.json"]
    overrides += _CLASSIFIERS.get(option, [])
    if "llava" in option or option == "demo_vl" or (group == "stage" and option != "none"):
        overrides += [*_VISION_LANGUAGE[group], "training.sample_tokens=0"]
        overrides += [f"data.{key}={empty_files(tmp_path / key) / name}" for key, name in DATA.items()]
        overrides += _FOLDERS if (option == "llava" and group == "model") or "moe_llava" in option else []
    config = load_config(overrides)
    assert build(yaml.safe_load(to_yaml(config))) == config


def test_every_registered_router_has_an_option_equal_to_its_preset() -> None:
    assert set(router_names()) == set(config_groups()["router"])
    for name in router_names():
        assert load_config([RUN_DIR, f"router={name}", "adaptation=split_all"]).router == router_config(name)


def test_packing_and_worker_processes_are_options_of_conversations(tmp_path: Path) -> None:
    empty_files(tmp_path)
    files = [f"data.{key}={tmp_path / name}" for key, name in DATA.items()]
    rest = [RUN_DIR, "stage=experts", "training.sample_tokens=0", *files]
    found = {
        name: load_config([*rest, *overrides]).data
        for name, overrides in {
            "plain": ["model=llava_tiny", "data=llava"],
            "packed": ["model=llava_tiny", "data=llava_packed"],
            "demo": ["experiment=demo_vl"],
        }.items()
    }
    assert {name: (data.packing, data.num_workers) for name, data in found.items()} == {
        "plain": (False, 4), "packed": (True, 4), "demo": (False, 0),
    }  # fmt: skip


def test_the_experiments_say_what_they_should() -> None:
    demo = load_config([RUN_DIR, "experiment=demo"])
    assert demo.router == TopAnyConfig.budgeted(2.0)
    assert demo.adaptation is not None
    assert demo.adaptation.last_growth_step == 0.5 * demo.training.steps
    assert (demo.adaptation.rule, demo.adaptation.prune_below_share) == ("split_strained", 0.1)
    smoke = load_config([RUN_DIR, "experiment=smoke"])
    assert smoke.training.steps <= 30 and smoke.adaptation is not None
    assert smoke.adaptation.every_steps * 2 <= smoke.training.steps, "adaptation is part of what a smoke test tries"
    assert (smoke.adaptation.rebalance_above, smoke.adaptation.rebalance_cost) == (1.0, 0.0)
    assert demo.adaptation.rebalance_above is None
    assert (demo.telemetry.detail, smoke.telemetry.detail) == ("brief", "detailed")


def test_rebalancing_goes_with_routers_without_growth_and_with_every_rule() -> None:
    only = load_config([RUN_DIR, "adaptation=rebalanced", "router=top_k", "training.steps=200"]).adaptation
    assert only is not None and (only.every_steps, only.window_steps, only.last_growth_step) == (10, 6, 0)
    assert (only.rebalance_above, only.rebalance_cost) == (1.1, 0.02)
    growing = load_config([RUN_DIR, "adaptation=split_all", "adaptation.rebalance_above=1.5"]).adaptation
    assert growing is not None and (growing.rebalance_above, growing.rebalance_cost) == (1.5, 0.02)


def test_the_command_line_wins_over_an_experiment() -> None:
    config = load_config([RUN_DIR, "experiment=smoke", "router=top_any", "adaptation=none", "training.steps=12"])
    assert config.router == TopAnyConfig()
    assert config.adaptation is None, "although the experiment sets keys of that section"
    assert config.training.steps == 12


def test_values_keep_their_types_and_may_refer_to_others() -> None:
    config = load_config(
        [RUN_DIR, "optim.lr=1e-4", "training.steps=100", "+optim.warmup_steps=${training.log_every_steps}",
         "++data.sequence_length=64", "training.sample_prompt='a, b: c'", "adaptation=recommended"]
    )  # fmt: skip
    assert config.optim.lr == 1e-4
    assert config.optim.warmup_steps == 10
    assert config.data.sequence_length == 64
    assert config.training.sample_prompt == "a, b: c"
    assert config.adaptation is not None and config.adaptation.last_growth_step == 40


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=dmeo"], "There is no option experiment=dmeo. Did you mean 'demo'? Options: demo,"),
        (["model=null"], "There is no option model=null. Options: "),
        (["routr=top_any"], "There is no group or key 'routr'. Did you mean 'router'? Groups: adaptation,"),
        (["+zzz=1"], "There is no group or key 'zzz'. Groups: adaptation,"),
        (["model={hidden_size: 64}"], "model is a group, so give its keys one by one, as in model.KEY=VALUE, or"),
        (["~seed"], "The override '~seed' would delete a key, but every key is needed. Give it a value instead."),
        (
            ["seed=1,2"],
            "The override 'seed=1,2' holds several values, but one run has one. `dynmoe train --multirun` makes",
        ),
        (["router@model=top_any"], "The override 'router@model=top_any' moves a group with '@', which does not work"),
        (["seed=[1"], "The override 'seed=[1' cannot be read. Write GROUP=OPTION or SECTION.KEY=VALUE,"),
        (["seed"], "The override 'seed' cannot be read. Write GROUP=OPTION or SECTION.KEY=VALUE,"),
        (["+model.hiden_size=1"], "There is no key 'model.hiden_size'. Did you mean 'model.hidden_size'?"),
        (["modl.hidden_size=64"], "There is no key 'modl'. Did you mean 'model'?"),
        (["hydra.run.dir=x"], "There is no key 'hydra'. The keys there are seed, run_dir, model,"),
        (["router.tempreature=2.0"], "There is no key 'router.tempreature'. Did you mean 'router.temperature'?"),
        (
            ["adaptation=none", "adaptation.noise=0.5"],
            "adaptation.noise is set, but adaptation=none switches that section off. Leave adaptation.noise out, or "
            "use adaptation=paper or rebalanced or recommended or split_all or split_loaded or split_strained.",
        ),
        (["telemetry.detail=all"], "telemetry.detail is 'all'. Use brief or detailed."),
        (["seed=${nothing.there}"], "The configuration cannot be resolved: Interpolation key 'nothing.there' not"),
        (["seed=???"], "The configuration cannot be resolved: Missing mandatory value: seed"),
    ],
)
def test_each_fault_of_the_command_line(overrides: list[str], message: str) -> None:
    faults = faults_of(RUN_DIR, *overrides)
    assert len(faults) == 1, faults
    assert faults[0].startswith(message), faults[0]


def test_all_faults_of_all_kinds_are_reported_at_once() -> None:
    faults = faults_of(
        RUN_DIR, "experiment=dmeo", "foo=1", "seed=[", "model.hiden_size=64", "training.steps=many", "optim.lr=-1.0",
        "parallel.ep_size=3", "router.temperature=0.0", "data.path=book.txt",
    )  # fmt: skip
    for part in ("experiment=dmeo", "'foo'", "'seed=['", "'model.hiden_size'", "training.steps is 'many'",
                 "optim.lr is -1.0", "parallel.ep_size is 3", "router.temperature is 0.0", "data.path is"):  # fmt: skip
        assert sum(part in fault for fault in faults) == 1, (part, faults)
    assert len(faults) == 9, faults


def test_misspelt_keys_in_yaml_are_reported_like_those_of_the_command_line(copied_tree: Path) -> None:
    (copied_tree / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nmodel:\n  hiden_size: 64\ntraning:\n  steps: 5\noptim:\n  lr: fast\n"
    )
    faults = faults_of(RUN_DIR, "experiment=mine", "data.vocabsize=3")
    assert set(faults) == {
        "There is no key 'traning'. Did you mean 'training'?",
        "There is no key 'model.hiden_size'. Did you mean 'model.hidden_size'?",
        "There is no key 'data.vocabsize'. Did you mean 'data.vocab_size'?",
        "optim.lr is 'fast' (text) but must be a number.",
    }


def test_yaml_that_cannot_be_read_and_options_that_do_not_exist_are_config_errors(copied_tree: Path) -> None:
    mine = copied_tree / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\nmodel: [\n")
    assert faults_of(RUN_DIR, "experiment=mine", "foo=1")[1].startswith("The configuration cannot be composed:")
    mine.write_text("# @package _global_\ndefaults:\n  - override /router: no_such\n")
    assert "no_such" in faults_of(RUN_DIR, "experiment=mine")[0]
    assert "no_such" in faults_of(RUN_DIR, config_name="no_such")[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=demo"],
        ["experiment=smoke", "adaptation=none", "parallel=single"],
        ["router=top_any_authors_code", "router.temperature=7", "optim.lr=1e-7", "training.sample_prompt='é: #\"x'"],
    ],
)
def test_yaml_gives_the_same_configuration_back(overrides: list[str]) -> None:
    config = load_config([RUN_DIR, *overrides])
    text = to_yaml(config)
    assert build(yaml.safe_load(text)) == config
    assert text.startswith("seed: 0\nrun_dir: runs/never-made-by-a-test\nmodel:\n  name: llama\n  hidden_size:")


def test_yaml_names_the_router_by_its_preset() -> None:
    def name(*overrides: str) -> str:
        return yaml.safe_load(to_yaml(load_config([RUN_DIR, *overrides])))["router"]["name"]

    assert name("router=top_any_recommended") == "top_any_recommended"
    assert name("router=top_any_recommended", "router.temperature=3.5") == "top_any", "no preset any more"


def test_run_folder_from_the_command_line_the_environment_or_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config([]).run_dir.startswith("runs/train-20")
    assert load_config(["experiment=demo"]).run_dir.startswith("runs/demo-20")
    monkeypatch.setenv("DYNMOE_RUN_DIR", "runs/from-the-launcher")
    assert load_config(["experiment=demo"]).run_dir == "runs/from-the-launcher"
    assert load_config(["run_dir=runs/mine"]).run_dir == "runs/mine"


def test_several_ranks_without_a_common_run_folder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert faults_of()[0].startswith("run_dir is not set and neither is DYNMOE_RUN_DIR, so that every rank would")


def test_only_rank_zero_asks_for_an_empty_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("")
    overrides = [f"run_dir={tmp_path}"]
    for rank in (None, "0"):
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert "exists and is not empty" in faults_of(*overrides)[0]
    monkeypatch.setenv("RANK", "1")
    assert load_config(overrides).run_dir == str(tmp_path)
