"""What `dynmoe doctor OVERRIDES` says of a run: whether its configuration, weights and data are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dynmoe_ds.cli.doctor import Finding
from dynmoe_ds.cli.doctor_of_pretrained import pretrained_findings, tokenizer_finding
from dynmoe_ds.cli.stage_overrides import (
    DEFAULT_STAGES,
    NAMES,
    STAGE,
    are_of_stages,
    overrides_by_stage,
    stage_folders,
    value_of,
)
from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import DataConfig, GlueDataConfig, LlavaDataConfig
from dynmoe_ds.config.validate import NO_STAGE, find_faults
from dynmoe_ds.errors import ConfigError, DynMoEError
from dynmoe_ds.telemetry.run_state import finished_steps


def run_findings(overrides: Sequence[str]) -> Iterator[Finding]:
    """What is there and what is missing of the run that `dynmoe train` would make with these overrides.

    Those of `dynmoe stages` are of as many runs as there are stages, or, with `stage=NAME` beside them, of that one
    stage's. What is the same for all is said once, anything else under the name of its stage.
    """
    stage = value_of(overrides, STAGE)
    if not are_of_stages(overrides) and (stage is not None or not _lacks_stage(overrides)):
        yield from _of_one_run(overrides)
        return
    overrides = [text for text in overrides if not text.startswith(STAGE)]
    names = (value_of(overrides, NAMES) or DEFAULT_STAGES).split(",")
    if stage is not None and stage not in names:
        names.append(stage)
    given = overrides_by_stage([*overrides, f"{NAMES}{','.join(names)}"])
    yield from (Finding(state="missing", subject="configuration", text=fault) for fault in given.faults)
    try:
        folders = stage_folders(overrides, given.by_stage)
    except ConfigError:  # which is found again
        folders = {}
    if stage is not None:
        yield from _of_stage(given.by_stage[stage], folders.get(stage))
        return
    stages_of: dict[Finding, list[str]] = {}
    for name in given.by_stage:
        for finding in _of_stage(given.by_stage[name], folders.get(name)):
            stages_of.setdefault(finding, []).append(name)
    for finding, found in stages_of.items():
        is_of_all = len(found) == len(given.by_stage)
        yield finding if is_of_all else replace(finding, subject=f"{', '.join(found)}: {finding.subject}")


def _lacks_stage(overrides: Sequence[str]) -> bool:
    """Whether the model is one that is trained in stages, and none is named."""
    try:
        load_config(overrides, check_files=False)
    except ConfigError as error:
        return NO_STAGE in error.faults
    return False


def _of_stage(overrides: Sequence[str], folder: Path | None) -> Iterator[Finding]:
    """folder: the stage's; None where it is not known."""
    if folder is None:
        yield from _of_one_run(overrides)
    elif finished_steps(folder) is not None:
        yield Finding(
            state="ok", subject="run_dir", text=f"{folder} has come to its end; `dynmoe stages` leaves it alone"
        )
    else:
        yield from _of_one_run([*overrides, f"run_dir={folder}"])


def _of_one_run(overrides: Sequence[str]) -> Iterator[Finding]:
    try:
        config = load_config(overrides, check_files=False)
    except ConfigError:
        yield from _faults(overrides)
        return
    yield Finding(state="ok", subject="configuration", text=f"without a fault; run folder {config.run_dir}")
    yield _devices(config.parallel.num_ranks)
    yield from pretrained_findings(config)
    # A fault of a file begins with its key.
    of_files = {fault.split()[0]: fault for fault in find_faults(config)}
    yield from (Finding(state="missing", subject=key, text=fault) for key, fault in of_files.items())
    yield from (finding for finding in _data(config.data) if finding.subject not in of_files)


def _faults(overrides: Sequence[str]) -> Iterator[Finding]:
    """Of a configuration that cannot work, about which there is no more to say."""
    try:
        load_config(overrides, check_files=True)
    except ConfigError as error:
        for fault in error.faults:
            yield Finding(state="missing", subject="configuration", text=fault)


def _devices(num_ranks: int) -> Finding:
    from dynmoe_ds.cli.launcher import check_devices

    try:
        check_devices(num_ranks)
    except ConfigError as error:
        return Finding(state="missing", subject="ranks", text=str(error))
    return Finding(state="ok", subject="ranks", text=f"{num_ranks} can be started here")


def _data(data: DataConfig) -> Iterator[Finding]:
    """Whether paths exist; of LLaVA's JSON how many samples are whole, but for their length, which the run looks at."""
    if isinstance(data, LlavaDataConfig):
        yield _conversations(data, "path")
        yield _conversations(data, "held_out_path")
        yield tokenizer_finding(data)
        return
    for key in ("path", "tokenizer"):
        if (path := getattr(data, key, None)) is None:
            continue
        is_there = Path(path).exists()
        if is_there and key == "tokenizer" and isinstance(data, GlueDataConfig):
            yield tokenizer_finding(data)
            continue
        text = f"{path} is there" if is_there else f"{path} is not there (seen from {Path.cwd()})"
        yield Finding(state="ok" if is_there else "missing", subject=f"data.{key}", text=text)


def _conversations(data: LlavaDataConfig, key: str) -> Finding:
    from dynmoe_ds.data.conversations import read_conversations

    subject, file = f"data.{key}", Path(getattr(data, key))
    try:
        kept, broken = read_conversations(file, Path(data.image_folder) if data.image_folder else None, "skip")
    except DynMoEError as error:
        return Finding(state="missing", subject=subject, text=str(error))
    text = f"{len(kept)} samples in {file}"
    if not len(broken):
        return Finding(state="ok", subject=subject, text=text)
    text += f", and {len(broken)} that cannot be used:\n{broken.summary()}\n"
    if data.on_broken == "skip":
        return Finding(state="note", subject=subject, text=f"{text}They are left out (data.on_broken=skip).")
    text += "Repair them, or leave them out with data.on_broken=skip."
    return Finding(state="missing", subject=subject, text=text)
