"""Values that are right by themselves and impossible together, all found at once, before any process group exists.

Each check is a function whose parameters are the sections it needs, so that a section which could not be built leaves
the checks on all others standing.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dynmoe_ds.adaptation import AdaptationConfig, rule_fault
from dynmoe_ds.config.schema import (
    BertClassifierConfig,
    CheckpointConfig,
    DataConfig,
    ExpertConfig,
    GlueDataConfig,
    ImageFolderConfig,
    LlamaModelConfig,
    LlavaDataConfig,
    LlavaModelConfig,
    MegatronIndexedConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TelemetryConfig,
    TextDataConfig,
    TokenShardsConfig,
    TrainingConfig,
    TransformerSizes,
    UpcycledConfig,
    ViTClassifierConfig,
)
from dynmoe_ds.routing import RouterConfig

# Of dynmoe_ds.data, which may not be imported here: the tokenizer's 256 bytes and end of text; the index of shards.
MIN_VOCAB_SIZE = 257
SHARD_INDEX_FILE = "index.json"
# Of dynmoe_ds.telemetry, as well.
CHECKPOINT_FOLDER = "checkpoints"
OWNER_FILE = "owner.json"
# Of dynmoe_ds.launching: made before the run, which is its own, started once or again.
LAUNCH_FOLDER = "launch"


def find_faults(config: RunConfig, *, check_files: bool = True) -> list[str]:
    """One sentence per impossible value or combination, each with the values and what to do; empty when sound.

    check_files: whether to look at the files that rank 0 alone reads and writes. Only rank 0 may ask: the others may be
    on machines without the text, and would see what rank 0 has already written into the run folder.
    """
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    return find_faults_in(sections, check_files=check_files)


def find_faults_in(sections: Mapping[str, Any], *, check_files: bool = True) -> list[str]:
    """As `find_faults`, of the checks whose sections are all given."""
    faults: list[str] = []
    for check in _CHECKS:
        needed = inspect.signature(check).parameters
        if check in _CHECKS_OF_FILES and not check_files:
            continue
        if all(name in sections for name in needed):
            faults.extend(check(**{name: sections[name] for name in needed}))
    return faults


def _at_least(section: str, values: object, least: int, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(values, name)
        if value < least:
            yield f"{section}.{name} is {value} but must be at least {least}."


def _multiple(name: str, value: int, of: str, base: int) -> Iterator[str]:
    """A fault unless `value` is a multiple of `base`, with the nearest values that are."""
    if base >= 1 and value >= 1 and value % base:
        below, above = value // base * base, (value // base + 1) * base
        nearest = f"{below} or {above}" if below else f"{above}"
        yield f"{name} is {value} but must be a multiple of {of}. Use {nearest}."


def _seed(seed: int) -> Iterator[str]:
    if not 0 <= seed < 2**63:
        yield f"seed is {seed} but must be at least 0 and below 2**63."


def _run_dir(run_dir: str, checkpoint: CheckpointConfig) -> Iterator[str]:
    if not run_dir.strip():
        yield "run_dir is empty. Name a folder that does not exist yet, as in run_dir=runs/first."
        return
    path = Path(run_dir)
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        is_resumed = checkpoint.resume == "auto" and not names.isdisjoint((CHECKPOINT_FOLDER, LAUNCH_FOLDER))
        if names - {LAUNCH_FOLDER, OWNER_FILE} and not is_resumed:
            yield f"run_dir {run_dir!r} exists and is not empty. Choose another `run_dir`, or move that folder away."
    elif path.exists():
        yield f"run_dir {run_dir!r} exists and is not a folder. Choose another `run_dir`."
    else:
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            why = "may not be written" if above.is_dir() else "is not a folder"
            yield f"run_dir {run_dir!r} cannot be made: {above} {why}. Choose another `run_dir`."


def _checkpoint(checkpoint: CheckpointConfig) -> Iterator[str]:
    yield from _at_least("checkpoint", checkpoint, 1, "keep")
    if checkpoint.every_steps is not None:
        yield from _at_least("checkpoint", checkpoint, 1, "every_steps")


def _pool(model: ModelConfig) -> Iterator[str]:
    yield from _at_least("model", model, 1, "num_slots")
    if not 1 <= model.num_experts <= model.num_slots:
        yield (
            f"model.num_experts is {model.num_experts} but must be between 1 and model.num_slots ({model.num_slots}): "
            "every expert needs a slot. Lower the one or raise the other."
        )


def _llama(model: LlamaModelConfig) -> Iterator[str]:
    yield from _at_least(
        "model", model, 1, "hidden_size", "num_layers", "num_heads", "dense_ffn_hidden_size", "expert_ffn_hidden_size",
    )  # fmt: skip
    yield from _at_least("model", model, 0, "shared_ffn_hidden_size")
    layers = model.num_layers
    if not 1 <= model.moe_every <= layers:
        yield (
            f"model.moe_every is {model.moe_every} but must be between 1 and model.num_layers ({layers}), or no layer "
            "has experts."
        )
    if model.moe_first is not None and not 0 <= model.moe_first < layers:
        yield (
            f"model.moe_first is {model.moe_first} but must be at least 0 and below model.num_layers ({layers}), or "
            "no layer has experts."
        )
    heads = model.num_heads
    # Rotary position embeddings turn pairs of channels.
    yield from _multiple("model.hidden_size", model.hidden_size, f"2 x model.num_heads (2 x {heads})", 2 * heads)


def _llava(model: LlavaModelConfig) -> Iterator[str]:
    for part in ("vision", "text"):
        pretrained, sizes = getattr(model, f"{part}_pretrained"), getattr(model, f"{part}_sizes")
        yield from _one_source(f"model.{part}_pretrained", pretrained, f"model.{part}_sizes", sizes)
        if sizes is not None:
            yield from _transformer_sizes(f"model.{part}_sizes", sizes)
    if isinstance(model.moe_layers, tuple):
        yield from _layer_numbers(model.moe_layers, model.text_sizes)
    if (text := model.text_sizes) is not None:
        # Rotary position embeddings turn pairs of channels.
        heads = text.num_heads
        yield from _multiple(
            "model.text_sizes.hidden_size", text.hidden_size, f"2 x model.text_sizes.num_heads (2 x {heads})", 2 * heads
        )


def _one_source(pretrained_key: str, pretrained: str | None, sizes_key: str, sizes: object) -> Iterator[str]:
    if (pretrained is None) == (sizes is None):
        given = "neither is" if sizes is None else "both are"
        yield (
            f"One of {pretrained_key} and {sizes_key} must be set, but {given}. Name the folder of a pretrained model "
            f"and set {sizes_key}=null, or the other way round for random weights."
        )


def _transformer_sizes(key: str, sizes: TransformerSizes) -> Iterator[str]:
    yield from _at_least(key, sizes, 1, *(field.name for field in fields(sizes)))
    heads = sizes.num_heads
    yield from _multiple(f"{key}.hidden_size", sizes.hidden_size, f"{key}.num_heads ({heads})", heads)


def _upcycled(model: UpcycledConfig) -> Iterator[str]:
    sizes = model.sizes if isinstance(model, BertClassifierConfig | ViTClassifierConfig) else None
    yield from _one_source("model.pretrained", model.pretrained, "model.sizes", sizes)
    if not 0 <= model.dropout < 1:
        yield f"model.dropout is {model.dropout} but must be at least 0 and below 1."
    yield from _layer_numbers(model.moe_layers, sizes)
    if sizes is not None:
        yield from _transformer_sizes("model.sizes", sizes)


def _layer_numbers(layers: tuple[int, ...], sizes: TransformerSizes | None) -> Iterator[str]:
    """sizes: of the model, where they are known before its weights are there."""
    if not layers:
        yield "model.moe_layers is empty, so that no layer has experts. Name layers, counted from 0."
    last = None if sizes is None or sizes.num_layers < 1 else sizes.num_layers - 1
    if last is not None and (outside := [layer for layer in layers if not -last - 1 <= layer <= last]):
        yield (
            f"model.moe_layers names {', '.join(map(str, outside))}, but the layers are 0 to {last}, or -1 to "
            f"{-last - 1} from the end."
        )
    from_start = [layer if last is None or layer >= 0 else layer + last + 1 for layer in layers]
    if len(set(from_start)) < len(layers):
        yield f"model.moe_layers is {list(layers)}, which names a layer twice. Name each once."


def _model(model: ModelConfig) -> Iterator[str]:
    yield from _pool(model)
    match model:
        case LlamaModelConfig():
            yield from _llama(model)
        case BertClassifierConfig() | ViTClassifierConfig():
            yield from _upcycled(model)
        case LlavaModelConfig():
            yield from _llava(model)


def _model_for_data(model: ModelConfig, data: DataConfig) -> Iterator[str]:
    match data:
        case TextDataConfig() | TokenShardsConfig() | MegatronIndexedConfig():
            wanted = "llama"
        case GlueDataConfig():
            wanted = "bert_classifier"
        case ImageFolderConfig():
            wanted = "vit_classifier"
        case LlavaDataConfig():
            wanted = "llava"
    if model.name != wanted:
        yield (
            f"model.name is {model.name} but data.name is {data.name}, for which it must be {wanted}. Choose another "
            "`model` or another `data`."
        )
    match model, data:
        case ViTClassifierConfig(sizes=sizes), ImageFolderConfig(image_size=image_size) if sizes is not None:
            yield from _multiple(
                "data.image_size", image_size, f"model.sizes.patch_size ({sizes.patch_size})", sizes.patch_size
            )
        case LlavaModelConfig(vision_sizes=sizes), LlavaDataConfig(image_size=image_size) if sizes is not None:
            yield from _multiple(
                "data.image_size", image_size, f"model.vision_sizes.patch_size ({sizes.patch_size})", sizes.patch_size
            )


def _expert_for_model(expert: ExpertConfig, model: ModelConfig) -> Iterator[str]:
    if isinstance(model, UpcycledConfig) and expert.kind != "gelu":
        yield (
            f"expert.kind is {expert.kind} but the experts of {model.name} are copies of its FFNs, which are gelu. Use "
            "expert=gelu."
        )


def _sample_for_data(data: DataConfig, training: TrainingConfig) -> Iterator[str]:
    if training.sample_tokens > 0 and isinstance(data, GlueDataConfig | ImageFolderConfig | LlavaDataConfig):
        yield (
            f"training.sample_tokens is {training.sample_tokens} but data.name is {data.name}, from which no model "
            "learns to write. Set training.sample_tokens=0."
        )


def _parallel(parallel: ParallelConfig) -> Iterator[str]:
    yield from _at_least("parallel", parallel, 1, "num_ranks", "process_group_timeout_s")
    if not 0 <= parallel.zero_stage <= 3:
        yield f"parallel.zero_stage is {parallel.zero_stage}. Use 0, 1, 2 or 3."
    if parallel.zero_stage == 3 and parallel.activation_checkpointing == "deepspeed":
        yield (
            "parallel.activation_checkpointing is deepspeed and parallel.zero_stage is 3, which DeepSpeed cannot do "
            "together. Use parallel.activation_checkpointing=torch, or a lower ZeRO stage."
        )
    ranks, ep_size = parallel.num_ranks, parallel.ep_size
    if ranks >= 1 and (ep_size < 1 or ranks % ep_size):
        *first, last = [str(size) for size in range(1, ranks + 1) if ranks % size == 0]
        options = f"{', '.join(first)} or {last}" if first else last
        yield (
            f"parallel.ep_size is {ep_size} but must divide the {ranks} {'ranks' if ranks > 1 else 'rank'} of "
            f"parallel.num_ranks. Use {options}."
        )
    yield from parallel.dispatch.faults_with(max(ep_size, 1))


def _slots(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    ep_size = parallel.ep_size
    if ep_size < 1 or parallel.num_ranks % ep_size:
        return  # _parallel asks for another ep_size, so advice for this one would mislead
    yield from _multiple("model.num_slots", model.num_slots, f"parallel.ep_size ({ep_size})", ep_size)


def _text(data: TextDataConfig) -> Iterator[str]:
    yield from _at_least("data", data, 2, "sequence_length", "held_out_every")
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
    yield from _at_least("data", data, 2, "sequence_length")
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
        yield from _at_least("data", data, 1, "held_out_windows")


def _megatron_indexed(data: MegatronIndexedConfig) -> Iterator[str]:
    yield from _at_least("data", data, 2, "sequence_length")
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
    yield from _at_least("data", data, 2, "sequence_length")
    yield from _at_least("data", data, 1, "num_train")
    if data.path is None:
        yield "data.path is null. Name the folder of the GLUE download, as in data.path=glue_data."
    if data.tokenizer is None:
        yield "data.tokenizer is null. Name the pretrained model's folder, or its tokenizer.json."


def _image_folder(data: ImageFolderConfig) -> Iterator[str]:
    yield from _at_least("data", data, 1, "image_size")
    yield from _at_least("data", data, 0, "num_workers")
    if data.path is None:
        yield "data.path is null. Name the folder that holds train/<class> and val/<class>, as in data.path=images."


def _llava_data(data: LlavaDataConfig) -> Iterator[str]:
    yield from _at_least("data", data, 0, "num_workers")
    yield from _at_least("data", data, 1, "image_size")
    yield from _at_least("data", data, 2, "sequence_length")
    wanted = {"path": "JSON file to learn from", "held_out_path": "JSON file to evaluate on"}
    wanted["tokenizer"] = "folder of the language model's tokenizer"
    for key, thing in wanted.items():
        if getattr(data, key) is None:
            yield f"data.{key} is null. Name the {thing}."


def _stage(model: ModelConfig, stage: StageConfig | None, adaptation: AdaptationConfig | None) -> Iterator[str]:
    if (stage is None) == isinstance(model, LlavaModelConfig):
        if stage is None:
            yield "model.name is llava but there is no stage. Choose one: stage=projector, language or experts."
        else:
            yield f"stage is set but model.name is {model.name}, which is trained in one go. Use stage=none."
    if stage is None:
        return
    if not stage.trained:
        yield "stage.trained is empty, so that nothing would be trained. Name a part of the model."
    if "experts" in stage.trained and not stage.has_experts:
        yield "stage.trained names experts but stage.has_experts is false. Set stage.has_experts=true."
    if adaptation is not None and not stage.has_experts:
        yield "adaptation is set but stage.has_experts is false: there is nothing to adapt. Use adaptation=none."
    if stage.start is not None and not Path(stage.start).is_dir():
        yield (
            f"stage.start is {stage.start!r}, which is not a folder here ({Path.cwd()}). Name the folder `model` in "
            "the run folder of the stage before."
        )


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


def _optim(optim: OptimConfig) -> Iterator[str]:
    if not optim.lr > 0:
        yield f"optim.lr is {optim.lr} but must be above 0."
    for name in ("beta1", "beta2"):
        beta = getattr(optim, name)
        if not 0 <= beta < 1:
            yield f"optim.{name} is {beta} but must be at least 0 and below 1."
    yield from _at_least("optim", optim, 0, "weight_decay", "warmup_steps")
    if not 0 <= optim.final_lr_fraction <= 1:
        yield f"optim.final_lr_fraction is {optim.final_lr_fraction} but must be between 0 and 1."
    if not optim.gradient_clipping >= 0:
        yield f"optim.gradient_clipping is {optim.gradient_clipping} but must be at least 0; 0 turns clipping off."


def _training(training: TrainingConfig) -> Iterator[str]:
    yield from _at_least(
        "training", training, 1, "steps", "micro_batch_size", "gradient_accumulation_steps", "log_every_steps",
        "eval_every_steps",
    )  # fmt: skip
    if training.eval_sequences is not None:
        yield from _at_least("training", training, 1, "eval_sequences")
    yield from _at_least("training", training, 0, "sample_tokens")
    if training.sample_tokens > 0 and not training.sample_prompt:
        yield (
            f"training.sample_prompt is empty but training.sample_tokens is {training.sample_tokens}. Give a prompt, "
            "or set training.sample_tokens=0."
        )


def _roll_back(training: TrainingConfig, checkpoint: CheckpointConfig) -> Iterator[str]:
    if training.on_non_finite == "roll_back" and checkpoint.every_steps is None:
        yield (
            "training.on_non_finite is roll_back but checkpoint.every_steps is null, so that there is nothing to go "
            "back to. Set checkpoint.every_steps, or use training.on_non_finite=skip_step."
        )


def _warmup(optim: OptimConfig, training: TrainingConfig) -> Iterator[str]:
    if optim.warmup_steps >= training.steps >= 1:
        yield (
            f"optim.warmup_steps is {optim.warmup_steps} but must be below training.steps ({training.steps}), or the "
            f"learning rate never falls. Use at most {training.steps - 1}, or train longer."
        )


def _adaptation(adaptation: AdaptationConfig | None, training: TrainingConfig) -> Iterator[str]:
    if adaptation is None:
        return
    name = "every_steps" if adaptation.first_step is None else "first_step"
    first = getattr(adaptation, name)
    if first > training.steps:
        yield (
            f"adaptation.{name} is {first} but training.steps is {training.steps}, so that no adaptation would ever "
            f"happen. Lower adaptation.{name}, or use adaptation=none."
        )


def _rule(adaptation: AdaptationConfig | None, router: RouterConfig) -> Iterator[str]:
    if adaptation is not None and (fault := rule_fault(adaptation, router)) is not None:
        yield fault


def _telemetry(telemetry: TelemetryConfig) -> Iterator[str]:
    if telemetry.wandb_mode != "disabled" and not telemetry.wandb_project.strip():
        yield (
            f"telemetry.wandb_project is empty but telemetry.wandb_mode is {telemetry.wandb_mode}. Name a project, or "
            "use telemetry=disabled."
        )


_CHECKS: tuple[Callable[..., Iterator[str]], ...] = (
    _seed, _run_dir, _checkpoint, _model, _model_for_data, _expert_for_model, _parallel, _slots, _data, _data_files,
    _optim, _training, _roll_back, _sample_for_data, _warmup, _adaptation, _rule, _telemetry,
    _stage,
)  # fmt: skip
_CHECKS_OF_FILES = (_run_dir, _data_files)
