"""What `dynmoe doctor OVERRIDES` says of the folders of pretrained models, whose weights it does not load."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from dynmoe_ds.cli.doctor import Finding
from dynmoe_ds.config.schema import (
    BertClassifierConfig,
    GlueDataConfig,
    ImageFolderConfig,
    LlavaDataConfig,
    LlavaModelConfig,
    RunConfig,
    ViTClassifierConfig,
)
from dynmoe_ds.errors import ConfigError, DataError, DynMoEError

# What transformers looks for, in this order; each may be in parts that an index beside it names.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The first byte of a pickle, which files of torch before 1.6 are; later ones are zip archives.
_PICKLE = b"\x80"


def pretrained_findings(config: RunConfig) -> Iterator[Finding]:
    """Of each pretrained model that the run starts from, one."""
    for field in fields(config.model):
        folder = getattr(config.model, field.name)
        if field.name.endswith("pretrained") and folder is not None:
            yield _of_folder(config, f"model.{field.name}", Path(folder))


def tokenizer_finding(data: LlavaDataConfig | GlueDataConfig) -> Finding:
    """Whether the run can use its tokenizer."""
    from dynmoe_ds.data import load_pretrained_tokenizer

    is_llava = isinstance(data, LlavaDataConfig)
    try:
        tokenizer = load_pretrained_tokenizer(data.tokenizer, needs_padding=not is_llava)
        if is_llava:
            from dynmoe_ds.training.tasks.vision_language import vocabulary_of

            vocabulary_of(tokenizer)
    except DataError as error:
        return Finding(state="missing", subject="data.tokenizer", text=str(error))
    return Finding(state="ok", subject="data.tokenizer", text=f"{len(tokenizer)} tokens")


def _of_folder(config: RunConfig, key: str, folder: Path) -> Finding:
    if not folder.is_dir():
        text = f"{folder} is not a folder here ({Path.cwd()}); download the model and name its folder"
        return Finding(state="missing", subject=key, text=text)
    lacking = [] if (folder / "config.json").exists() else ["config.json"]
    files, lacking_weights = _weights(folder)
    lacking += lacking_weights
    if lacking:
        text = f"{folder} has no {' and no '.join(lacking)}; download the whole model"
        return Finding(state="missing", subject=key, text=text)
    if faults := [*_faults_of_model(config, key), *_faults_of_weights(files)]:
        return Finding(state="missing", subject=key, text=" ".join(faults))
    return Finding(state="ok", subject=key, text=f"{folder} has a configuration and weights")


def _weights(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of weights, which may be parts; and, if they are not whole, those that are not there."""
    lacking: list[str] = []
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name], []
        if index.exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                parts = [folder / part for part in sorted(set(weight_map.values()))]
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                lacking.append(f"{index.name} that can be read")
                continue
            absent = [part.name for part in parts if not part.exists()]
            if not absent:
                return parts, []
            lacking += absent
    return [], lacking or [f"weights ({' or '.join(_WEIGHTS)})"]


def _faults_of_weights(files: Sequence[Path]) -> Iterator[str]:
    """Of files that do not begin, or do not end, as files of weights do: cut off, or never fetched by git-lfs."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # which reads the header and holds the file's length against it
                    continue
            if zipfile.is_zipfile(file):
                continue
            with file.open("rb") as opened:
                if opened.read(1) == _PICKLE:
                    continue
            reason = "it is neither a zip archive nor a pickle"
        except (OSError, SafetensorError) as error:
            reason = str(error)
        yield f"{file} cannot be read as a file of weights: {reason}. Download it again."


def _faults_of_model(config: RunConfig, key: str) -> tuple[str, ...]:
    """What the run would say of the folder's model before it loads weights."""
    try:
        _take(config, key)
    except ConfigError as error:
        return error.faults
    return ()


def _take(config: RunConfig, key: str) -> None:
    """Raises: ConfigError, as the run does."""
    from dynmoe_ds.data import read_image_statistics
    from dynmoe_ds.models import Head, bert_backbone, pretrained_decoder, pretrained_tower, vit_backbone

    no_labels = Head(labels=())  # the head is new in any case
    match config.model, config.data:
        case LlavaModelConfig(vision_pretrained=str(folder)), LlavaDataConfig(image_size=size) if "vision" in key:
            pretrained_tower(folder, size)
            read_image_statistics(folder, size)
        case LlavaModelConfig(text_pretrained=str(folder)), LlavaDataConfig(sequence_length=length):
            pretrained_decoder(folder, length)
        case BertClassifierConfig() as model, GlueDataConfig() as data:
            bert_backbone(model, no_labels, vocab_size=_num_tokens(data), max_length=data.sequence_length)
        case ViTClassifierConfig() as model, ImageFolderConfig() as data:
            vit_backbone(model, no_labels, image_size=data.image_size)
        case model, data:
            raise AssertionError(f"{key} of {type(model).__name__} with {type(data).__name__}")


def _num_tokens(data: GlueDataConfig) -> int:
    """0 for a tokenizer that cannot be used, of which `tokenizer_finding` tells."""
    from dynmoe_ds.data import load_pretrained_tokenizer

    try:
        return len(load_pretrained_tokenizer(data.tokenizer))
    except DynMoEError:
        return 0
