"""Tasks of lm-evaluation-harness on what runs and exports have left, without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import dynmoe_ds as dm
from dynmoe_ds.cli.main import main
from dynmoe_ds.config.load import load_config, to_yaml
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.data import load_pretrained_tokenizer
from dynmoe_ds.harness import lm_eval as adapter
from dynmoe_ds.harness.harness_model import HarnessModel
from dynmoe_ds.models import count_flops, count_parameters, dense_model
from dynmoe_ds.training.tasks import build_task
from tests.helpers.vision_language import tiny_run, write_digits

QUESTIONS = ("What is 10 and 3?", "It is 12. What is 1 and 2, and what is more?", "Is", "What is 7?")
CHOICES = ("12", "13 or more", "1", "13")  # with one token after the same ones, and with several
LENGTH = 48
STOP, NUM_WRITTEN = "d", 13  # the model writes it after 1, 11, 12 and 14 tokens


def write_run(folder: Path, config: RunConfig) -> Path:
    """A run that has come to its end, without its steps: a model whose weights are all random and large."""
    task = build_task(config)
    model = task.build_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    task.write_files(folder)
    tokenizer = load_pretrained_tokenizer(f"{folder / 'tokenizer'}", needs_padding=False)
    unreadable = [id_ for id_ in range(len(tokenizer)) if not tokenizer.decode(id_).isascii()]
    with torch.no_grad():
        model.get_output_embeddings().weight[unreadable] = 0  # the likeliest token's logit is above 0
    dm.save_model(model, folder / "model")
    return folder


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(rows))
    data = {"data_files": {"test": f"{folder / name}.json"}, "cache_dir": f"{folder / 'cache'}"}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "num_fewshot": 0}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | config))


def metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small, threads that wait for one another on a busy machine are most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "book.txt").write_text("".join(f"What is {a} and {a % 7}? It is {a + a % 7}.\n\n" for a in range(200)))
    sizes = ["model.hidden_size=32", "model.num_layers=4", "model.num_heads=2", "model.dense_ffn_hidden_size=32"]
    sizes += ["model.expert_ffn_hidden_size=16", "model.num_experts=4", "model.num_slots=6", "data.vocab_size=300"]
    data = ["data=text_file", f"data.path={folder}/book.txt", f"data.sequence_length={LENGTH}", "data.held_out_every=2"]
    common = ["parallel=single", "telemetry=disabled", "adaptation=none", "router=top_any"]
    return write_run(folder / "run", load_config([*sizes, *data, *common, f"run_dir={folder}/run"]))


@pytest.fixture(scope="module")
def plain(run: Path) -> Plain:
    return Plain(run)


@pytest.fixture(scope="module")
def tasks(run: Path, plain: Plain) -> Path:
    """`choice`: questions with three or four answers. `writing`: what greedy decoding does before STOP, but for one."""
    folder = run.parent / "tasks"
    folder.mkdir()
    rows = [
        {"question": question, "choices": CHOICES[: 4 - index % 2], "label": index % 3}
        for index, question in enumerate(QUESTIONS)
    ]
    of_choices = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
    metrics = [metric("acc"), metric("acc_norm")]
    write_task(folder, "choice", rows, output_type="multiple_choice", metric_list=metrics, **of_choices)
    write_task(folder, "choice_2", rows[:1], output_type="multiple_choice", metric_list=metrics, **of_choices)
    write_task(
        folder,
        "choice_shown",
        [{"question": question, "choices": ["B", "C"], "label": 0} for question in QUESTIONS],
        output_type="multiple_choice",
        metric_list=metrics,
        fewshot_split="test",
        num_fewshot=None,
        **of_choices,
    )
    group = {"group": "choices", "task": ["choice", "choice_2"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "choices.yaml").write_text(yaml.safe_dump(group))
    answers = [plain.writes(question, NUM_WRITTEN)[0].partition(STOP)[0] for question in QUESTIONS]
    write_task(
        folder,
        "writing",
        [
            {"question": question, "answer": answer if index != 2 else "wrong"}
            for index, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
        ],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [STOP], "max_gen_toks": NUM_WRITTEN, "do_sample": False},
        metric_list=[metric("exact_match")],
    )
    return folder


class Plain:
    """One text at a time, without padding and without a cache."""

    def __init__(self, run: Path) -> None:
        self.model = dm.load_model(run / "model")
        self.tokenizer: PreTrainedTokenizerFast = load_pretrained_tokenizer(f"{run / 'tokenizer'}")
        self.layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, dm.MoELayer)}
        self._known: dict[tuple[int, ...], Tensor] = {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        if tuple(ids) not in self._known:
            self._known[tuple(ids)] = self.model(input_ids=torch.tensor([ids])).logits[0].double()
        return self._known[tuple(ids)]

    def says(self, context: str, continuation: str) -> tuple[float, bool]:
        """log p(continuation | context), token by token, and whether each is the likeliest."""
        ids, total, is_greedy = self.ids(context + continuation), 0.0, True
        for at in range(len(self.ids(context)), len(ids)):
            logits = self.logits(ids[:at])[-1]
            total += float(logits[ids[at]] - logits.exp().sum().log())
            is_greedy &= int(logits.argmax()) == ids[at]
        return total, is_greedy

    def writes(self, prompt: str, num_tokens: int) -> tuple[str, list[int]]:
        ids = self.ids(prompt)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        written = ids[len(self.ids(prompt)) :]
        return self.tokenizer.decode(written), written

    def choices_per_token(self, rows: list[list[int]]) -> dict[str, list[int]]:
        """By layer, how many experts each token of the rows has, by the routers' own masks."""
        counts: dict[str, list[int]] = {name: [] for name in self.layers}
        handles = [
            layer.router.register_forward_hook(
                lambda _, __, routing, found=counts[name]: found.extend(routing.mask.sum(1).tolist())
            )
            for name, layer in self.layers.items()
        ]
        with torch.no_grad():
            for row in rows:
                self.model(input_ids=torch.tensor([row]))
        for handle in handles:
            handle.remove()
        return counts

    def rows_of_choices(self) -> list[list[int]]:
        """What must be computed of `choice`, each once."""
        asked = [(question, choice) for index, question in enumerate(QUESTIONS) for choice in CHOICES[: 4 - index % 2]]
        rows = {tuple(self.ids(f"{question} {choice}")[:-1]) for question, choice in asked}
        return [list(row) for row in rows]

    def rows_of_writing(self) -> list[list[int]]:
        """What must be computed of `writing`: all but the last token of what stands there at the end."""
        rows = []
        for question in QUESTIONS:
            ids = self.ids(question)
            for token in self.writes(question, NUM_WRITTEN)[1]:
                ids.append(token)
                if STOP in self.tokenizer.decode(token):
                    break
            rows.append(ids[:-1])
        return rows


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a network, and none asks pip and the system what is installed."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without its own 14,000 tasks, which take long to read."""
    whole: Callable[..., None] = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *args, **given: whole(self, *args, **given | {"include_defaults": False})
    )


def requests(task: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(task_name=task, args=args) for args in arguments]


def scores_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def check_cost(cost: dict[str, Any], plain: Plain, rows: list[list[int]]) -> None:
    """Against the routers' masks of single texts, and each token's FLOPs in its own text."""
    lengths = [len(row) for row in rows]
    want = {name: sum(found) / len(found) for name, found in plain.choices_per_token(rows).items()}
    assert cost["num_tokens"] == sum(lengths)
    assert cost["mean_k_per_layer"] == pytest.approx(want) and 1 < cost["mean_k"] < 4
    assert cost["mean_k"] == pytest.approx(sum(want.values()) / len(want))
    assert cost["active_parameters"] == pytest.approx(count_parameters(plain.model, 1).active_per_token(want))
    flops = sum(length * count_flops(plain.model, length).forward(want) for length in lengths) / sum(lengths)
    assert cost["forward_flops_per_token"] == pytest.approx(flops, rel=0.01)  # by the rounded length


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_are_those_of_single_texts_in_batches_of_unequal_lengths(
    batch_size: int, run: Path, plain: Plain
) -> None:
    pairs = [(question, f" {choice}") for question in QUESTIONS for choice in CHOICES]
    pairs.append(("What is 7?", plain.writes("What is 7?", 3)[0]))
    model = HarnessModel(run, batch_size=batch_size)
    found = model.loglikelihood(requests("a", *pairs), disable_tqdm=True)
    want = [plain.says(*pair) for pair in pairs]
    assert [one[0] for one in found] == pytest.approx([one[0] for one in want], rel=1e-4)
    assert [one[1] for one in found] == [one[1] for one in want] == [False] * 16 + [True]
    rows = {tuple(plain.ids(context + continuation)[:-1]) for context, continuation in pairs}
    assert len(rows) < len(pairs), "answers of one token share a row"
    check_cost(asdict(model.cost(["a"])), plain, [list(row) for row in rows])
    # A text longer than the model's length, in windows, and without a beginning: its end of text stands before it.
    text = " ".join(QUESTIONS * 2)
    ids = [plain.tokenizer.eos_token_id, *plain.ids(text)]
    assert len(ids) > LENGTH + 1
    (rolled,) = model.loglikelihood_rolling(requests("b", (text,)), disable_tqdm=True)
    first = plain.logits(ids[:LENGTH]).log_softmax(-1)
    rest = plain.logits(ids[-LENGTH - 1 : -1]).log_softmax(-1)
    want_rolled = sum(float(first[at, ids[at + 1]]) for at in range(LENGTH))
    want_rolled += sum(float(rest[at - len(ids), ids[at]]) for at in range(LENGTH + 1, len(ids)))
    assert rolled == pytest.approx(want_rolled, rel=1e-4)
    assert model.cost(["b"]).num_tokens == 2 * LENGTH


def test_the_harness_own_model_says_the_same(run: Path, plain: Plain) -> None:
    """The one for Hugging Face, which pads without a mask, on a model without padding."""
    pairs = requests("a", *((question, f" {choice}") for question in QUESTIONS for choice in CHOICES))
    theirs = get_model("hf")(pretrained=plain.model, tokenizer=plain.tokenizer, batch_size=1)
    want = theirs.loglikelihood(pairs, disable_tqdm=True)
    found = HarnessModel(run).loglikelihood(pairs, disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in want], rel=1e-4)
    assert [one[1] for one in found] == [one[1] for one in want]


def test_every_score_has_its_own_cost_beside_it(
    run: Path, tasks: Path, plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scores_of(capsys, run, "--tasks", "choice,writing", "--task-folder", tasks, "--batch-size", 3)
    right = {"acc": 0, "acc_norm": 0}
    for index, question in enumerate(QUESTIONS):
        offered = CHOICES[: 4 - index % 2]
        sums = [plain.says(question, f" {choice}")[0] for choice in offered]
        per_letter = [value / len(choice) for value, choice in zip(sums, offered, strict=True)]
        right["acc"] += sums.index(max(sums)) == index % 3
        right["acc_norm"] += per_letter.index(max(per_letter)) == index % 3
    assert right["acc"] != right["acc_norm"]
    assert found["choice"]["scores"] == {name: count / 4 for name, count in right.items()}
    assert found["choice"]["stderr"].keys() == right.keys()
    assert (found["choice"]["num_examples"], found["choice"]["num_fewshot"]) == (4, 0)
    assert found["writing"]["scores"] == {"exact_match": 0.75}
    written = [
        len(row) + 1 - len(plain.ids(asked)) for row, asked in zip(plain.rows_of_writing(), QUESTIONS, strict=True)
    ]
    assert sorted(written) == [1, 11, 12, NUM_WRITTEN], "texts of a batch stop at their own times"
    check_cost(found["choice"]["cost"], plain, plain.rows_of_choices())
    check_cost(found["writing"]["cost"], plain, plain.rows_of_writing())
    assert main(["evaluate", f"{run}", "--tasks", "choice,writing", "--task-folder", f"{tasks}"]) == 0
    head, *lines = (re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines())
    assert head[:4] == ["task", "examples", "metric", "score"] and len(lines) == 3
    assert lines[2][:4] == ["writing", "4", "exact_match", "0.7500"]
    assert head[5:] == ["mean k", "active parameters", "FLOPs per token"]
    for line in lines:
        cost = found[line[0]]["cost"]
        mean_k, *counts = line[5:]
        assert mean_k == f"{cost['mean_k']:.3f}"
        want = [round(cost[name]) for name in ("active_parameters", "forward_flops_per_token")]
        assert [int(count.replace(",", "")) for count in counts] == want
    assert all(a != b for a, b in zip(lines[0][5:], lines[2][5:], strict=True)), "each task has its own"


@pytest.mark.usefixtures("own_tasks_alone")
def test_groups_limits_and_examples_in_the_prompt(
    run: Path, tasks: Path, plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = scores_of(capsys, run, "--tasks", "choices", "--task-folder", tasks)
    assert whole.keys() == {"choices", "choice", "choice_2"}
    assert whole["choices"]["num_examples"] == 5
    assert whole["choices"]["scores"]["acc"] == pytest.approx(
        (4 * whole["choice"]["scores"]["acc"] + whole["choice_2"]["scores"]["acc"]) / 5
    )
    first = {tuple(plain.ids(f"{QUESTIONS[0]} {choice}")[:-1]) for choice in CHOICES}
    check_cost(whole["choices"]["cost"], plain, [*plain.rows_of_choices(), *map(list, first)])
    few = scores_of(capsys, run, "--tasks", "choice_*", "--task-folder", tasks, "--limit", 1)
    assert few.keys() == {"choice_2", "choice_shown"} and few["choice_shown"]["num_examples"] == 1
    check_cost(few["choice_2"]["cost"], plain, [list(row) for row in first])
    shown = scores_of(capsys, run, "--tasks", "choice_shown", "--task-folder", tasks, "--limit", 1, "--fewshot", 1)
    assert (few["choice_shown"]["num_fewshot"], shown["choice_shown"]["num_fewshot"]) == (0, 1)
    assert shown["choice_shown"]["cost"]["num_tokens"] > few["choice_shown"]["cost"]["num_tokens"]


def test_other_folders_say_the_same(
    run: Path, tasks: Path, plain: Plain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--tasks", "choice", "--task-folder", tasks]
    want = scores_of(capsys, run, *common)
    assert main(["export", f"{run}", f"{tmp_path / 'exported'}"]) == 0
    capsys.readouterr()
    assert scores_of(capsys, tmp_path / "exported", *common) == want
    assert scores_of(capsys, run / "model", *common, "--tokenizer", run / "tokenizer") == want
    # A model without experts, of transformers alone: all its parameters are active.
    dense = dense_model(type(plain.model), plain.model.config.to_dict(), seed=0)
    dense.save_pretrained(tmp_path / "dense")
    plain.tokenizer.save_pretrained(tmp_path / "dense")
    cost = scores_of(capsys, tmp_path / "dense", *common)["choice"]["cost"]
    assert (cost["mean_k"], cost["mean_k_per_layer"], cost["num_tokens"]) == (
        None,
        {},
        want["choice"]["cost"]["num_tokens"],
    )
    assert cost["active_parameters"] == dense.num_parameters()
    assert main(["evaluate", f"{tmp_path / 'dense'}", *map(str, common)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[5] == "-"


def test_a_vision_language_model_is_asked_in_text(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = write_digits(tmp_path / "digits")
    seen = write_run(tmp_path / "run", tiny_run(digits, tmp_path / "run", "experts"))
    plain = Plain(seen)
    found = scores_of(capsys, seen, "--tasks", "choice", "--task-folder", tasks)
    check_cost(found["choice"]["cost"], plain, plain.rows_of_choices())


@pytest.mark.usefixtures("own_tasks_alone")
def test_the_harness_own_command_knows_the_model(
    run: Path, tasks: Path, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"run --model dynmoe --model_args path={run} --tasks choice --include_path {tasks} --batch_size 2"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *given.split(), "--output_path", f"{tmp_path}/out.json"])
    adapter.main()
    (file,) = tmp_path.glob("out*.json")
    config = json.loads(file.read_text())["config"]
    check_cost(config["cost_per_task"]["choice"], plain, plain.rows_of_choices())
    monkeypatch.setattr(sys, "argv", ["lm_eval", *given.replace("--batch_size 2", "--batch_size auto").split()])
    with pytest.raises(SystemExit, match="batch_size is auto but must be one number, 1 or more"):
        adapter.main()


@pytest.mark.usefixtures("own_tasks_alone")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3", "--tokenizer", "a"], "--limit belongs to --tasks."),
        (["--download"], "--download belongs to --tasks."),
        (["--tasks", "choice", "--answers", "a.png"], "--answers belongs to the run's own held-out data."),
        (["--tasks", "choice", "--limit", "0"], "--limit is 0 but must be at least 1."),
        (["--tasks", "choice", "--fewshot", "-1"], "--fewshot is -1 but must be at least 0."),
        (["--tasks", "choice", "--batch-size", "0"], "--batch-size is 0 but must be at least 1."),
        (["--tasks", "choices,choice_2"], "choice_2 is asked for more than once, by itself or in a group of tasks."),
        (["--tasks", ","], "No task is named. Name some of lm-evaluation-harness, such as arc_easy."),
        (["--tasks", "choise"], "lm-evaluation-harness has no task 'choise'. Did you mean choice"),
        (["--tasks", "xyzxyz"], "lm-evaluation-harness has no task 'xyzxyz'. `lm-eval ls tasks` lists them."),
        (["--tasks", "far"], "The task far cannot be loaded (ConnectionError: Couldn't reach 'nobody/nothing'"),
        (["--tasks", "far"], "`dynmoe evaluate --download` fetches them where there is a network."),
        (["--tasks", "gone"], "The task gone cannot be loaded (FileNotFoundError: "),
        (["--tasks", "long"], "The task long lets a model write 48 tokens, but this one takes 48, prompt included."),
        (["--tasks", "beams"], "The task beams searches with 2 beams, whose tokens are not counted apart."),
        (["--tasks", "answers"], "The task answers has an answer of 61 tokens, but the model takes 48."),
        (["--tasks", "choice_shown", "--fewshot", "9"], "With 9 examples in the prompt: Sample larger than population"),
        (["--tasks", "seen"], "The task seen shows images; models are asked in text alone here."),
        (["--tasks", "code"], "The task code runs code that the model writes."),
    ],
)
def test_tasks_and_options_that_cannot_work(
    arguments: list[str], message: str, run: Path, tasks: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(tasks, tmp_path / "tasks")
    row = {"question": "Is", "answer": "1 " * 60}
    text = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    writing = text | {"output_type": "generate_until", "generation_kwargs": {"until": ["."], "max_gen_toks": 48}}
    write_task(folder, "long", [row], metric_list=[metric("exact_match")], **writing)
    beams = writing | {"generation_kwargs": {"until": ["."], "max_gen_toks": 4, "num_beams": 2}}
    write_task(folder, "beams", [row], metric_list=[metric("exact_match")], **beams)
    write_task(folder, "answers", [row], metric_list=[metric("acc")], output_type="loglikelihood", **text)
    write_task(folder, "seen", [row], metric_list=[metric("exact_match")], doc_to_image=["question"], **writing)
    write_task(folder, "code", [row], metric_list=[metric("exact_match")], unsafe_code=True, **writing)
    write_task(folder, "gone", [row], metric_list=[metric("exact_match")], **writing)
    (folder / "gone.json").unlink()
    far = {"task": "far", "dataset_path": "nobody/nothing", "test_split": "test", **writing}
    (folder / "far.yaml").write_text(yaml.safe_dump(far))
    named = ["--task-folder", f"{folder}"] if "--tasks" in arguments else []
    assert main(["evaluate", f"{run}", *arguments, *named]) == 2
    assert message in capsys.readouterr().err


def test_folders_and_tokenizers_that_cannot_be_used(
    run: Path, tasks: Path, plain: Plain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(folder: Path, *more: object) -> str:
        assert main(["evaluate", f"{folder}", "--tasks", "choice", "--task-folder", f"{tasks}", *map(str, more)]) == 2
        return capsys.readouterr().err

    assert "has no config.yaml, manifest.json or config.json (seen from" in refusal(tmp_path)
    assert "There is no folder gone (seen from" in refusal(run, "--task-folder", "gone")
    assert f"There is no tokenizer.json in {run}/model (seen" in refusal(run / "model")
    assert "There is no tokenizer.json in gone (seen from" in refusal(run, "--tokenizer", "gone")
    plain.tokenizer.save_pretrained(tmp_path / "tokenizer")
    endless = load_pretrained_tokenizer(f"{tmp_path / 'tokenizer'}")
    endless.add_tokens(["a word", "another"])
    endless.save_pretrained(tmp_path / "more")
    assert "more has 302 tokens, but the model in" in refusal(run, "--tokenizer", tmp_path / "more")
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    assert "endless names no end-of-text token (eos_token)." in refusal(run, "--tokenizer", tmp_path / "endless")
    (tmp_path / "config.json").write_text("{}")
    assert f"{tmp_path} holds no model that can be loaded (ValueError: " in refusal(tmp_path)


def test_texts_that_are_too_long_lose_their_beginnings_with_a_warning(
    run: Path, plain: Plain, caplog: pytest.LogCaptureFixture
) -> None:
    context = " ".join(QUESTIONS * 2)
    model = HarnessModel(run)
    ((found, _),) = model.loglikelihood(requests("long", (context, " 1")), disable_tqdm=True)
    ids = plain.ids(f"{context} 1")
    want = plain.logits(ids[-LENGTH - 1 : -1])[-1].log_softmax(-1)[ids[-1]]
    assert found == pytest.approx(float(want), rel=1e-4)
    assert "1 of 1 texts of the task long are longer than the model's 48 tokens" in caplog.text


@pytest.mark.parametrize("name", ["lm_eval", "accelerate"])
def test_without_the_extra_one_sentence_names_it(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["evaluate", f"{run}", "--tasks", "arc_easy"]) == 2
    said = f"need {name}, which is not installed. Install the extra: pip install 'dynmoe-ds[eval]'."
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="Install the extra"):
        adapter.main()


def test_nothing_is_downloaded_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is read when Hugging Face's packages are imported: nothing may import them before."""
    loaded = "import sys, dynmoe_ds.cli.main; print({'huggingface_hub', 'datasets', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
    found: list[str | None] = []
    monkeypatch.setattr(
        adapter, "evaluate_tasks", lambda *_, **__: found.append(os.environ.get("HF_HUB_OFFLINE")) or {}
    )
    for more in ([], ["--download"]):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        assert main(["evaluate", "anything", "--tasks", "a", *more]) == 0
    assert found == ["1", None]
