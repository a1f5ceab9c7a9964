"""What `dynmoe doctor OVERRIDES` says of a run: whether its configuration, weights and data are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from dynmoe_ds.cli.doctor import Finding
from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import LlavaDataConfig, RunConfig
from dynmoe_ds.errors import ConfigError, DynMoEError

_WEIGHTS = ("*.safetensors", "*.bin")


def run_findings(overrides: Sequence[str]) -> Iterator[Finding]:
    """What is there and what is missing of the run that `dynmoe train` would make with these overrides."""
    try:
        config = load_config(overrides)
    except ConfigError as error:
        for fault in error.faults:
            yield Finding(state="missing", subject="configuration", text=fault)
        return
    yield Finding(state="ok", subject="configuration", text=f"without a fault; run folder {config.run_dir}")
    yield _devices(config.parallel.num_ranks)
    for field in fields(config.model):
        folder = getattr(config.model, field.name)
        if field.name.endswith("pretrained") and folder is not None:
            yield _pretrained(f"model.{field.name}", Path(folder))
    yield from _data(config)


def _devices(num_ranks: int) -> Finding:
    from dynmoe_ds.cli.launcher import check_devices

    try:
        check_devices(num_ranks)
    except ConfigError as error:
        return Finding(state="missing", subject="ranks", text=str(error))
    return Finding(state="ok", subject="ranks", text=f"{num_ranks} can be started here")


def _pretrained(key: str, folder: Path) -> Finding:
    if not folder.is_dir():
        text = f"{folder} is not a folder here ({Path.cwd()}); download the model and name its folder"
        return Finding(state="missing", subject=key, text=text)
    lacking = [] if (folder / "config.json").exists() else ["config.json"]
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        lacking.append(f"weights ({', '.join(_WEIGHTS)})")
    if lacking:
        return Finding(state="missing", subject=key, text=f"{folder} has no {' and no '.join(lacking)}")
    return Finding(state="ok", subject=key, text=f"{folder} has a configuration and weights")


def _data(config: RunConfig) -> Iterator[Finding]:
    """Whether paths exist; of LLaVA's JSON how many samples are whole, but for their length, which the run looks at."""
    if not isinstance(data := config.data, LlavaDataConfig):
        for key in ("path", "tokenizer"):
            if (path := getattr(data, key, None)) is not None:
                is_there = Path(path).exists()
                text = f"{path} is there" if is_there else f"{path} is not there (seen from {Path.cwd()})"
                yield Finding(state="ok" if is_there else "missing", subject=f"data.{key}", text=text)
        return
    from dynmoe_ds.data.conversations import read_conversations

    for key in ("path", "held_out_path"):
        try:
            file = Path(getattr(data, key))
            kept, broken = read_conversations(file, Path(data.image_folder) if data.image_folder else None, "skip")
        except DynMoEError as error:
            yield Finding(state="missing", subject=f"data.{key}", text=str(error))
            continue
        text = f"{len(kept)} samples in {file}"
        if len(broken):
            text += f", and {len(broken)} that cannot be used:\n{broken.summary()}"
        is_fine = len(broken) == 0 or data.on_broken == "skip"
        yield Finding(state="ok" if is_fine else "missing", subject=f"data.{key}", text=text)
    from dynmoe_ds.data.pretrained_tokenizer import load_pretrained_tokenizer

    try:
        tokenizer = load_pretrained_tokenizer(data.tokenizer, needs_padding=False)
        yield Finding(state="ok", subject="data.tokenizer", text=f"{len(tokenizer)} tokens")
    except DynMoEError as error:
        yield Finding(state="missing", subject="data.tokenizer", text=str(error))
