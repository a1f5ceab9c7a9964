"""The fit, its predictions, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.scale.design import Case, sweeps
from benchmarks.scale.measure import BUCKET_ELEMENTS
from dynmoe_ds.planning import Cluster, Link, ModelShape, memory_per_rank, shape_of, work_per_rank
from dynmoe_ds.planning.fit import MeasuredStep, fit_cluster, held_out_error, predicted_time
from dynmoe_ds.planning.work import Work

TEXT_BEGIN, TEXT_END = "<!-- measured -->", "<!-- end of measured -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """One case: measured and predicted seconds, bytes at the fullest moment, and bytes that dispatch sends."""

    case: Case
    step_s: float
    predicted_s: float
    peak_bytes: float
    predicted_bytes: float
    sent_bytes: float
    predicted_sent_bytes: float

    @property
    def time_ratio(self) -> float:
        return self.predicted_s / self.step_s

    @property
    def memory_ratio(self) -> float:
        return self.predicted_bytes / self.peak_bytes


def write_report(found: Mapping[str, Any], cases: Sequence[Case], output: Path, cluster_file: Path) -> Iterator[Path]:
    """Fit on what was measured, and write the cluster's file, the table and the plot; gives their paths."""
    by_name = {line["name"]: line for line in found["cases"]}
    cluster, predictions = predict(found, [case for case in cases if case.name in by_name])
    write_cluster(cluster, cluster_file)
    yield cluster_file
    yield _write_table(found, cluster, predictions, output / "scale.md")
    yield _plot(predictions, output / "scale.png")


def predict(found: Mapping[str, Any], cases: Sequence[Case]) -> tuple[Cluster, list[Predicted]]:
    """The cluster fitted on the cases for that, with its errors on the others, and the predictions of all."""
    by_name = {line["name"]: line for line in found["cases"]}
    processors = int(found["machine"]["processors"])
    shapes: dict[Case, ModelShape] = {
        case: replace(shape_of(case.config(), None), mean_k=by_name[case.name]["mean_k"]) for case in cases
    }
    works: dict[Case, Work] = {case: work_per_rank(shapes[case], case.layout()) for case in cases}
    steps = {
        case: MeasuredStep(
            work=works[case],
            layout=case.layout(),
            slowdown=max(1.0, case.num_ranks / processors),
            step_s=by_name[case.name]["step_s"],
        )
        for case in cases
    }
    fitted = fit_cluster([steps[case] for case in cases if case.role == "fit"], _template(found, processors))
    predictions = [
        Predicted(
            case=case,
            step_s=steps[case].step_s,
            predicted_s=predicted_time(steps[case], fitted),
            peak_bytes=by_name[case.name]["peak_bytes"],
            predicted_bytes=memory_per_rank(
                shapes[case], case.layout(), commits_on_touch=False, bucket_elements=BUCKET_ELEMENTS
            ).total,
            sent_bytes=by_name[case.name]["dispatch_bytes"],
            predicted_sent_bytes=works[case].dispatch.bytes_within,
        )
        for case in cases
    ]
    held_out = [prediction for prediction in predictions if prediction.case.role == "held out"]
    error = held_out_error([p.time_ratio for p in held_out], [p.memory_ratio for p in held_out])
    return replace(fitted, held_out=error), predictions


def _template(found: Mapping[str, Any], processors: int) -> Cluster:
    """All but what the fit finds."""
    machine = found["machine"]
    return Cluster(
        source=f"fitted by `{found['command']}` on {processors} processors with gloo, one thread per rank, float32; "
        f"torch {machine['torch']}, deepspeed {machine['deepspeed']}",
        num_nodes=1,
        ranks_per_node=processors,
        processors_per_node=processors,
        memory_per_rank_gib=float(max(machine["memory_gib"] // processors, 1)),
        commits_on_touch=True,
        overlap=0.0,
        float32=None,
        bfloat16=None,
        memory_bytes_per_s=None,
        optimizer_bytes_per_s=None,
        router_entries_per_s=None,
        layer_s=0.0,
        slot_s=0.0,
        micro_step_s=0.0,
        tensor_s=0.0,
        fetch_s=0.0,
        within_node=Link(bytes_per_s=None, latency_s=0.0),
        between_nodes=None,
        held_out=None,
    )


def write_cluster(cluster: Cluster, path: Path) -> None:
    """The description as `dynmoe plan` reads it."""
    head = "# This machine's CPU. Written by `python -m benchmarks.scale`, which says what each number was fitted on.\n"
    plain = _plain(asdict(cluster))
    path.write_text(head + yaml.safe_dump(plain, sort_keys=False, width=116), encoding="utf-8")


def _plain(value: Any) -> Any:
    """With four digits, which are more than the measurement has, and lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _write_table(found: Mapping[str, Any], cluster: Cluster, predictions: Sequence[Predicted], path: Path) -> Path:
    """The measured part between its marks; what stands around it stays."""
    measured = "\n".join([TEXT_BEGIN, *_lines(found, cluster, predictions), TEXT_END])
    text = path.read_text(encoding="utf-8") if path.exists() else f"# What a step costs\n\n{TEXT_BEGIN}{TEXT_END}\n"
    path.write_text(text.split(TEXT_BEGIN)[0] + measured + text.split(TEXT_END)[1], encoding="utf-8")
    return path


def _lines(found: Mapping[str, Any], cluster: Cluster, predictions: Sequence[Predicted]) -> Iterator[str]:
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    error = cluster.held_out
    assert error is not None
    yield f"`{found['command']}` ({machine}; {found['minutes']} minutes, {found['passes']} passes of {found['rounds']}"
    yield "rounds, least times of the slowest rank). float32, AdamW, gloo, one thread per rank."
    yield ""
    yield f"On {error.num_layouts} held-out layouts, predicted over measured:"
    yield ""
    yield _row("", "median error", "worst error", "least ratio", "greatest ratio")
    yield _row(*["---"] * 5)
    yield _row("step time", _percent(error.median_time_error), _percent(error.worst_time_error),
               *(f"{ratio:.2f}" for ratio in error.time_ratios))  # fmt: skip
    yield _row("memory of the fullest rank", _percent(error.median_memory_error), _percent(error.worst_memory_error),
               *(f"{ratio:.2f}" for ratio in error.memory_ratios))  # fmt: skip
    yield ""
    for role in ("fit", "held out"):
        yield "Fitted on:" if role == "fit" else "Held out:"
        yield ""
        yield _row(
            "case", "step, ms", "predicted", "ratio", "memory, MB", "predicted", "ratio", "dispatch, MB", "predicted"
        )
        yield _row(*["---"] * 9)
        for p in predictions:
            if p.case.role == role:
                yield _row(p.case.name, f"{p.step_s * 1e3:.1f}", f"{p.predicted_s * 1e3:.1f}", f"{p.time_ratio:.2f}",
                           f"{p.peak_bytes / 1e6:.1f}", f"{p.predicted_bytes / 1e6:.1f}", f"{p.memory_ratio:.2f}",
                           f"{p.sent_bytes / 1e6:.2f}", f"{p.predicted_sent_bytes / 1e6:.2f}")  # fmt: skip
        yield ""
    yield "What was fitted, as `configs/cluster/local_cpu.yaml` has it (null: too small to be seen):"
    yield ""
    yield _row("coefficient", "value")
    yield _row(*["---"] * 2)
    for name, value in _coefficients(cluster).items():
        yield _row(name, "null" if value is None else f"{value:.3g}")
    yield ""
    yield "![Growth](scale.png)"


def _coefficients(cluster: Cluster) -> dict[str, float | None]:
    assert cluster.float32 is not None
    return {
        "float32.dense, FLOP/s": cluster.float32.dense,
        "float32.experts, FLOP/s": cluster.float32.experts,
        "memory_bytes_per_s": cluster.memory_bytes_per_s,
        "optimizer_bytes_per_s": cluster.optimizer_bytes_per_s,
        "router_entries_per_s": cluster.router_entries_per_s,
        "layer_s": cluster.layer_s,
        "slot_s": cluster.slot_s,
        "micro_step_s": cluster.micro_step_s,
        "tensor_s": cluster.tensor_s,
        "fetch_s": cluster.fetch_s,
        "within_node.bytes_per_s": cluster.within_node.bytes_per_s,
        "within_node.latency_s": cluster.within_node.latency_s,
    }


def _plot(predictions: Sequence[Predicted], path: Path) -> Path:
    """Step time as tokens, experts, k and ranks grow, and all predictions beside what was measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    by_case = {prediction.case: prediction for prediction in predictions}
    curves = {name: points for name, points in sweeps(list(by_case)).items() if len(points) > 1}
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, (name, points) in zip(axes, curves.items(), strict=False):
        for label, style in (("step_s", "o"), ("predicted_s", "-")):
            values = [getattr(by_case[case], label) * 1e3 for _, case in points]
            axis.plot([x for x, _ in points], values, style, label="measured" if style == "o" else "predicted")
        top = max(max(by_case[case].step_s, by_case[case].predicted_s) for _, case in points) * 1e3
        axis.set_xscale("log", base=2)
        axis.set(xlabel=name, ylabel="step, ms", ylim=(0, 1.1 * top))
        axis.legend()
    for axis, measured, predicted, factor, label in (
        (axes[-2], "step_s", "predicted_s", 1e3, "step, ms"),
        (axes[-1], "peak_bytes", "predicted_bytes", 1e-6, "memory of a rank, MB"),
    ):
        for role, style in (("fit", "."), ("held out", "x")):
            chosen = [p for p in predictions if p.case.role == role]
            axis.loglog([getattr(p, measured) * factor for p in chosen],
                        [getattr(p, predicted) * factor for p in chosen], style, label=role)  # fmt: skip
        ends = [getattr(p, measured) * factor for p in predictions]
        axis.loglog([min(ends), max(ends)], [min(ends), max(ends)], "k:", linewidth=1)
        axis.set(xlabel=f"measured {label}", ylabel="predicted")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend()
    figure.savefig(path, dpi=110)
    return path


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
