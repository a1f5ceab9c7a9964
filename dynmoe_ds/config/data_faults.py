"""What is impossible about the data of a run, and which of its files are not there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from dynmoe_ds.config.bounds import at_least
from dynmoe_ds.config.schema import (
    DataConfig,
    GlueDataConfig,
    ImageFolderConfig,
    LlavaDataConfig,
    MegatronIndexedConfig,
    TextDataConfig,
    TokenShardsConfig,
)

# Of dynmoe_ds.data, which may not be imported here: the tokenizer's 256 bytes and end of text; the index of shards.
MIN_VOCAB_SIZE = 257
SHARD_INDEX_FILE = "index.json"


def _data(data: DataConfig) -> Iterator[str]:
    match data:
        case LlavaDataConfig():
            yield from _llava_data(data)
        case GlueDataConfig():
            yield from _glue(data)
        case ImageFolderConfig():
            yield from _image_folder(data)
        case TextDataConfig():
            yield from _text(data)
        case TokenShardsConfig():
            yield from _token_shards(data)
        case MegatronIndexedConfig():
            yield from _megatron_indexed(data)


def _data_files(data: DataConfig) -> Iterator[str]:
    match data:
        case TextDataConfig(name="text_file", path=str(path)) if not Path(path).is_file():
            yield f"data.path is {path!r}, which is not a file here ({Path.cwd()}). Correct the path."
        case LlavaDataConfig():
            for key in ("path", "held_out_path"):
                path = getattr(data, key)
                if path is not None and not Path(path).is_file():
                    yield f"data.{key} is {path!r}, which is not a file here ({Path.cwd()}). Correct the path."
            if data.image_folder is not None and not Path(data.image_folder).is_dir():
                yield f"data.image_folder is {data.image_folder!r}, but there is no such folder here ({Path.cwd()})."
            if data.tokenizer is not None and not Path(data.tokenizer).exists():
                yield f"data.tokenizer is {data.tokenizer!r}, which does not exist here ({Path.cwd()}). Correct it."
        case TokenShardsConfig(path=str(path)) if not (Path(path) / SHARD_INDEX_FILE).is_file():
            yield (
                f"data.path is {path!r}, which has no {SHARD_INDEX_FILE} here ({Path.cwd()}). Correct the path, or "
                "write the folder with `dynmoe tokenize`."
            )
        case MegatronIndexedConfig():
            names = [f"{path}{ending}" for path in data.paths for ending in (".idx", ".bin")]
            if missing := [name for name in names if not Path(name).is_file()]:
                yield (
                    f"data.paths needs {', '.join(missing)}, which cannot be found here ({Path.cwd()}). Name data sets "
                    "without .bin and .idx, or write them with `dynmoe data index`."
                )
            if data.tokenizer is not None and not Path(data.tokenizer).exists():
                yield f"data.tokenizer is {data.tokenizer!r}, which does not exist here ({Path.cwd()}). Correct it."


def _text(data: TextDataConfig) -> Iterator[str]:
    yield from at_least("data", data, 2, "sequence_length", "held_out_every")
    if data.vocab_size < MIN_VOCAB_SIZE:
        yield (
            f"data.vocab_size is {data.vocab_size} but must be at least {MIN_VOCAB_SIZE}: 256 bytes and the end of "
            "text."
        )
    if data.name == "text_file":
        if data.path is None:
            yield "data.path is null but data.name is text_file. Name the file, as in data.path=book.txt."
    elif data.path is not None:
        yield (
            f"data.path is {data.path!r} but data.name is {data.name}, which reads no file. Use data=text_file, or "
            "leave data.path null."
        )


def _token_shards(data: TokenShardsConfig) -> Iterator[str]:
    yield from at_least("data", data, 2, "sequence_length")
    if data.path is None:
        yield "data.path is null. Name the folder that `dynmoe tokenize` wrote, as in data.path=shards."
    if data.held_out_windows is None and not data.held_out_shards:
        yield (
            "data.held_out_windows is null and data.held_out_shards is empty, so that nothing would be held out. Set "
            "one of them."
        )
    elif data.held_out_windows is not None and data.held_out_shards:
        yield (
            f"data.held_out_windows is {data.held_out_windows} and data.held_out_shards names "
            f"{', '.join(data.held_out_shards)}, but only one of them can say what is held out. Set "
            "data.held_out_windows=null, or data.held_out_shards=[]."
        )
    elif data.held_out_windows is not None:
        yield from at_least("data", data, 1, "held_out_windows")


def _megatron_indexed(data: MegatronIndexedConfig) -> Iterator[str]:
    yield from at_least("data", data, 2, "sequence_length")
    if not data.paths:
        yield "data.paths is empty. Name what `dynmoe data index` wrote, as in 'data.paths=[corpus/books]'."
    if data.tokenizer is None:
        yield "data.tokenizer is null. Name the folder of the tokenizer that made the data, or its tokenizer.json."
    if data.weights and len(data.weights) != len(data.paths):
        yield (
            f"data.weights has {len(data.weights)} numbers but data.paths {len(data.paths)} data sets. Give one weight "
            "for each, or data.weights=[]."
        )
    if odd := [weight for weight in data.weights if not 0 < weight < math.inf]:
        yield f"data.weights has {odd[0]} but every weight must be above 0. Leave out the data set that is not wanted."
    if not 0 < data.held_out_fraction < 1:
        yield f"data.held_out_fraction is {data.held_out_fraction} but must be between 0 and 1."


def _glue(data: GlueDataConfig) -> Iterator[str]:
    yield from at_least("data", data, 2, "sequence_length")
    yield from at_least("data", data, 1, "num_train")
    if data.path is None:
        yield "data.path is null. Name the folder of the GLUE download, as in data.path=glue_data."
    if data.tokenizer is None:
        yield "data.tokenizer is null. Name the pretrained model's folder, or its tokenizer.json."


def _image_folder(data: ImageFolderConfig) -> Iterator[str]:
    yield from at_least("data", data, 1, "image_size")
    yield from at_least("data", data, 0, "num_workers")
    if data.path is None:
        yield "data.path is null. Name the folder that holds train/<class> and val/<class>, as in data.path=images."


def _llava_data(data: LlavaDataConfig) -> Iterator[str]:
    yield from at_least("data", data, 0, "num_workers")
    yield from at_least("data", data, 1, "image_size")
    yield from at_least("data", data, 2, "sequence_length")
    wanted = {"path": "JSON file to learn from", "held_out_path": "JSON file to evaluate on"}
    wanted["tokenizer"] = "folder of the language model's tokenizer"
    for key, thing in wanted.items():
        if getattr(data, key) is None:
            yield f"data.{key} is null. Name the {thing}."


CHECKS = (_data,)
CHECKS_OF_FILES = (_data_files,)
