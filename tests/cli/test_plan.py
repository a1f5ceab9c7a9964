"""`dynmoe plan` from outside: the table, the overrides to paste, and every fault as a message."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dynmoe_ds.cli.main import main
from dynmoe_ds.config.groups import cluster_names
from dynmoe_ds.config.load import load_config
from dynmoe_ds.planning import candidates, shape_of
from dynmoe_ds.planning.load_cluster import load_cluster

RUN_DIR = "run_dir=runs/never-made-by-a-test"
DEMO = [RUN_DIR, "experiment=demo"]
# A decoder of two billion parameters; its data are not needed.
LARGE = [
    RUN_DIR, "model=llama_top_p", "router=top_p", "adaptation=none", "data.vocab_size=32000",
    "data.sequence_length=2048", "parallel=node", "cluster=h100_nodes", "plan.mean_k=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DYNMOE_RUN_DIR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)


def _rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if re.match(r" +\d+ +\d+ +\d ", line)]


def test_the_demo_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *DEMO, "--all"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 of 4 layers with 4 experts in 16 slots, 2 per token on average; ")
    cluster, config = load_cluster("local_cpu", []), load_config(DEMO)
    found = candidates(shape_of(config, None), cluster, dtype="float32", chunks=1)
    rows = _rows(text)
    assert len(rows) == len(found)
    assert [row[:3] for row in rows] == [
        [str(n) for n in (c.layout.ep_size, c.layout.edp_size, c.layout.zero_stage)] for c in found
    ]
    best = found[0]
    assert f"{best.memory.total / 2**30:.2f}" in rows[0] and f"{best.tokens_per_s:,.0f}" in rows[0]
    pasted = re.search(r"^best: (.*)$", text, re.MULTILINE)
    assert pasted is not None
    parallel = load_config([*DEMO, *pasted[1].split()]).parallel
    assert (parallel.ep_size, parallel.zero_stage) == (best.layout.ep_size, best.layout.zero_stage)
    assert cluster.held_out is not None
    flat = " ".join(text.split())
    assert f"prediction error: on {cluster.held_out.num_layouts} held-out layouts of small models" in flat
    assert f"worst {cluster.held_out.worst_time_error:.0%}" in flat


def test_ten_rows_unless_all_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *DEMO]) == 0
    text = capsys.readouterr().out
    assert len(_rows(text)) == 10 and "... and 6 slower ones that fit; --all prints them" in text


def test_a_large_model_on_nodes_that_nobody_has_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *LARGE, "cluster.num_nodes=2", "cluster.memory_per_rank_gib=30"]) == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    assert "cluster h100_nodes: 2 nodes of 8 ranks, 30 GiB per rank" in text
    assert "not measured: figures of the vendor" in flat
    assert "prediction error: not known, nothing was measured" in flat
    assert re.search(r"\d+ of 48 layouts do not fit into 30 GiB:\n  EP \d+, EDP \d+, ZeRO-\d.* GiB: \w+ \d", text)
    sizes = [float(re.findall(r"\d+\.\d\d", " ".join(row))[-1]) for row in _rows(text)]
    assert len(sizes) > 3 and all(0 < size <= 30 for size in sizes)
    assert "best: parallel.num_ranks=16 " in text


def test_a_model_that_fits_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *LARGE, "cluster.memory_per_rank_gib=1"]) == 1
    flat = " ".join(capsys.readouterr().out.split())
    assert "32 of 32 layouts do not fit into 1 GiB" in flat and "best:" not in flat
    assert re.search(r"The model fits nowhere: the smallest layout needs \d+\.\d GiB per rank\. Use more nodes", flat)


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["router=top_any", "adaptation=none"], ["Give plan.mean_k, such as plan.mean_k=2."]),
        (["plan.mean_k=3"], ["plan.mean_k is 3.0 but the router holds 2 experts per token by its own settings."]),
        (["plan.mean_k=many"], ["plan.mean_k is 'many' but must be a number."]),
        (["plan.mean=2"], ["There is no key 'plan.mean'. Did you mean 'plan.mean_k'?"]),
        (["plan=2"], ["There is no key 'plan'. The verb's own are plan.mean_k."]),
        (["cluster=h100_node"], ["There is no option cluster=h100_node. Did you mean 'h100_nodes'?"]),
        (["cluster.num_nodes=1,2"], ["The override 'cluster.num_nodes=1,2' cannot be read. Write cluster.KEY=VALUE"]),
        (
            ["parallel.dtype=bfloat16"],
            ["parallel.dtype is bfloat16 but the cluster's rates are known in float32 only."],
        ),
        (
            ["cluster.nodes=2", "optim.lrr=1", "plan.k=1"],
            ["3 faults", "There is no key 'cluster.nodes'", "There is no key 'optim.lrr'", "There is no key 'plan.k'"],
        ),
    ],
)
def test_faults_are_messages_and_2(
    overrides: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *DEMO, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dynmoe: ") and "Traceback" not in error
    for message in messages:
        assert message in error


def test_the_help_names_the_clusters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert " | ".join(cluster_names()) in text and "plan.mean_k=NUMBER" in text and "examples:" in text
    assert all(len(line) <= 120 for line in text.splitlines() if line.startswith("  "))


def test_runs_know_no_clusters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", RUN_DIR, "cluster=local_cpu"]) == 2
    assert "There is no group or key 'cluster'" in capsys.readouterr().err


def test_the_cluster_of_the_table_is_the_one_given() -> None:
    changed = load_cluster("h100_nodes", [("memory_per_rank_gib", 30)])
    assert changed == replace(load_cluster("h100_nodes", []), memory_per_rank_gib=30.0)
