"""Where a run's numbers and events go: the console, the run folder, Weights & Biases."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.telemetry.events import EventDict, describe_event
from dynmoe_ds.telemetry.metrics import Metric, Tier, tier_of
from dynmoe_ds.telemetry.run_folder import SWEEP_FILE, RunFolder
from dynmoe_ds.telemetry.tensorboard import TensorBoardTracker, require_tensorboard

logger = logging.getLogger(__name__)

WandbMode = Literal["offline", "online", "disabled"]
WANDB_INIT_TIMEOUT_S = 60
WANDB_FINISH_TIMEOUT_S = 60  # wandb itself would wait without end for a server that has gone
LAYERS_ON_PROGRESS_LINE = 8
WANDB_ID_FILE = "wandb/run_id"
LIVE_EXPERTS_PREFIX = "moe/live_experts/"
_MAX_LISTED = 4
_STAGE_FOLDER = re.compile(r"\d_.+")  # as `dynmoe stages` names them


class Tracker(Protocol):
    """A destination of metrics and adaptation events. Lives on rank 0; values come already reduced over ranks."""

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        """Record the values of one optimiser step (counted from 1)."""

    def log_event(self, event: EventDict) -> None:
        """Record one adaptation (its fields: `dynmoe_ds.telemetry.events`)."""

    def close(self) -> None:
        """Finish; nothing is logged afterwards."""


class JsonLinesTracker:
    """Metrics and events as lines of the run folder's files. The folder's owner closes it, not this tracker."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        self._folder.append_metrics(step, {metric.name: metric.value for metric in metrics})

    def log_event(self, event: EventDict) -> None:
        self._folder.append_adaptation(event)

    def close(self) -> None:
        """Nothing to do: every line is already in its file."""


class ConsoleTracker:
    """A progress line for people, and every adaptation event in words.

    On a terminal the progress line is rewritten in place; elsewhere every `log` gives one line. `stream` None sends
    the lines to `logging` at level INFO. `clock` gives seconds and serves the estimate of the time left.
    """

    def __init__(
        self, total_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps = total_steps
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._latest: dict[str, float] = {}
        self._shown = ""

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        self._latest.update({metric.name: metric.value for metric in metrics})
        line = self._progress_line(step, self._seconds_left(step, now))
        if self._is_terminal:
            self._rewrite(line)
        else:
            self._write_line(line)

    def log_event(self, event: EventDict) -> None:
        progress = self._shown
        self._rewrite("")
        for line in describe_event(event):
            self._write_line(line)
        self._rewrite(progress)

    def close(self) -> None:
        """Leave the terminal's cursor on a fresh line."""
        if self._shown and self._stream is not None:
            self._put("\n")
            self._shown = ""

    def _progress_line(self, step: int, left_s: float | None) -> str:
        width = len(str(self._total_steps))
        parts = [f"step {step:>{width + 1}}/{self._total_steps}"]
        for name, label, form in (
            ("train/loss", "loss", ".3f"),
            ("eval/loss", "held-out", ".3f"),
            ("moe/mean_k", "k", ".2f"),
        ):
            if name in self._latest:
                parts.append(f"{label} {self._latest[name]:{form}}")
        live = [value for name, value in self._latest.items() if name.startswith(LIVE_EXPERTS_PREFIX)]
        if len(live) > LAYERS_ON_PROGRESS_LINE:
            parts.append(f"experts {min(live):.0f}..{max(live):.0f} in {len(live)} layers")
        elif live:
            parts.append(f"experts {' '.join(f'{value:.0f}' for value in live)}")
        if "train/tokens_per_second" in self._latest:
            parts.append(f"{short_number(self._latest['train/tokens_per_second'])} tok/s")
        if "train/compute_time_s" in self._latest and self._latest.get("train/step_time_s"):
            parts.append(f"compute {self._latest['train/compute_time_s'] / self._latest['train/step_time_s']:.0%}")
        if left_s is not None:
            parts.append(f"eta {clock_time(left_s)}")
        return "  ".join(parts)

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Steps left times the mean seconds per step since the first log; None where no step has been timed yet."""
        assert self._first is not None, "the first log call sets the start"
        first_step, first_s = self._first
        if step > first_step:
            return (self._total_steps - step) * (now - first_s) / (step - first_step)
        if "train/step_time_s" in self._latest:
            return (self._total_steps - step) * self._latest["train/step_time_s"]
        return None

    def _write_line(self, line: str) -> None:
        if self._stream is None:
            logger.info(line)
        else:
            self._put(line + "\n")

    def _rewrite(self, line: str) -> None:
        """Replace the progress line on a terminal, cut to its width: a wrapped line could not be rewritten."""
        if not self._is_terminal or self._stream is None or line == self._shown == "":
            return
        line = line[: shutil.get_terminal_size().columns - 1]
        blank = " " * max(0, len(self._shown) - len(line))
        self._put(f"\r{line}{blank}" + ("" if line else "\r"))
        self._shown = line

    def _put(self, text: str) -> None:
        """Write to the terminal until it is closed, which must not end a training that can go on without it."""
        assert self._stream is not None
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._stream = None


class BriefTracker:
    """Gives another tracker the metrics of the brief tier only, and everything else as it comes."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        if brief := [metric for metric in metrics if tier_of(metric.name) == "brief"]:
            self._tracker.log(step, brief)

    def log_event(self, event: EventDict) -> None:
        self._tracker.log_event(event)

    def close(self) -> None:
        self._tracker.close()


class WandbTracker:
    """Metrics, configuration and a table of adaptation events for Weights & Biases, inside the run folder.

    A run that is started again has the id that its folder keeps: online it goes on in the same run there, offline each
    start leaves a part of its own. The runs of a sweep or of stages are a group, any other run is one of its own.
    wandb is imported here and not before. Whatever goes wrong inside it is logged once as a warning, after which the
    tracker does nothing: training never stops for it.

    Raises: ConfigError where wandb is not installed.
    """

    def __init__(self, run_dir: str | Path, config: Mapping[str, Any], project: str, mode: WandbMode) -> None:
        require_wandb(mode)
        self._run: Any = None
        self._wandb: Any = None
        self._event_rows: list[list[Any]] = []
        try:
            import wandb

            self._wandb = wandb
            self._run = wandb.init(
                project=project,
                mode=mode,
                dir=str(run_dir),
                id=_kept_id(Path(run_dir) / WANDB_ID_FILE),
                resume="allow",
                name=Path(run_dir).resolve().name,
                group=_group(Path(run_dir).resolve(), config),
                config={**config, **_job()},
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=WANDB_INIT_TIMEOUT_S,
                    finish_timeout=WANDB_FINISH_TIMEOUT_S,
                    finish_timeout_raises=True,
                ),
            )
            # An own step axis: wandb's drops what arrives out of order, such as an event after the metrics of its step.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up("starting", error)

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        self._log({"step": step, **{metric.name: metric.value for metric in metrics}})

    def log_event(self, event: EventDict) -> None:
        self._event_rows.extend([event["step"], line] for line in describe_event(event))
        if self._run is None:
            return
        try:
            table = self._wandb.Table(columns=["step", "event"], data=[list(row) for row in self._event_rows])
        except Exception as error:
            self._give_up("making a table", error)
        else:
            self._log({"step": event["step"], "adaptation/events": table})

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up("finishing", error)
            self._run = None

    def _log(self, values: dict[str, Any]) -> None:
        if self._run is not None:
            try:
                self._run.log(values)
            except Exception as error:
                self._give_up("logging", error)

    def _give_up(self, doing: str, error: Exception) -> None:
        self._run = None
        logger.warning(
            "wandb failed while %s (%s: %s). Training goes on without it; the run folder still gets every number.",
            doing,
            type(error).__name__,
            " ".join(f"{error}".split()),  # wandb's own may be of several lines
        )


def _kept_id(file: Path) -> str:
    """The id in a file, which is written if it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(8), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _group(run_dir: Path, config: Mapping[str, Any]) -> str:
    """What runs that belong together share: the name of the folder of their sweep or stages; else the run's own."""
    is_stage = config.get("stage") is not None and _STAGE_FOLDER.fullmatch(run_dir.name)
    return run_dir.parent.name if is_stage or (run_dir.parent / SWEEP_FILE).exists() else run_dir.name


def _job() -> dict[str, str]:
    """The number under which Slurm knows this job; nothing elsewhere."""
    return {"slurm_job_id": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}


def require_wandb(mode: WandbMode) -> None:
    """Check that wandb can be used as asked for. Raises: ConfigError for an unknown mode or a missing package."""
    if mode not in ("offline", "online", "disabled"):
        raise ConfigError(f"telemetry.wandb_mode is {mode!r}. Use offline, online or disabled.")
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"telemetry.wandb_mode is {mode} but the package wandb is not installed. "
            f"Run `pip install wandb`, or set telemetry.wandb_mode=disabled."
        )


def build_trackers(
    *,
    rank: int,
    folder: RunFolder | None,
    config: Mapping[str, Any],
    total_steps: int,
    wandb_mode: WandbMode,
    wandb_project: str,
    tensorboard: bool = False,
    detail: Tier = "brief",
    first_step: int = 0,
    stream: TextIO | None = None,
) -> list[Tracker]:
    """The trackers of this rank: all on rank 0, none elsewhere. `folder` is None where the rank is not 0.

    detail: the tier that Weights & Biases and TensorBoard get, where every name is a chart; the run folder's lines get
    all. first_step: the optimiser step after which the run begins. Raises: ConfigError on every rank where wandb or
    TensorBoard is asked for and missing.
    """
    require_wandb(wandb_mode)
    if tensorboard:
        require_tensorboard()
    if rank != 0:
        return []
    assert folder is not None, f"rank {rank} writes the run folder but folder is {folder}"
    charts: list[Tracker] = []
    if wandb_mode != "disabled":
        charts.append(WandbTracker(folder.path, config, wandb_project, wandb_mode))
    if tensorboard:
        charts.append(TensorBoardTracker(folder.path, first_step))
    if detail == "brief":
        charts = [BriefTracker(chart) for chart in charts]
    return [JsonLinesTracker(folder), ConsoleTracker(total_steps, stream), *charts]


def short_number(value: float) -> str:
    """A number in at most five characters or so: 850, 12.3k, 1.2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"


def short_list(numbers: Sequence[int], of: str) -> str:
    """Whole numbers one by one, or from the least to the largest where there are many; nothing of none."""
    if len(numbers) <= _MAX_LISTED:
        return ", ".join(map(str, numbers))
    return f"{min(numbers)} to {max(numbers)} in {len(numbers)} {of}"


def clock_time(seconds: float) -> str:
    """A duration as m:ss, or h:mm:ss from one hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def spoken_time(seconds: float) -> str:
    """A duration with its units, the two largest of them: `42 s`, `1 min 5 s`, `3 h 20 min`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute} min"
    return f"{minute} min {second} s" if minute else f"{second} s"
