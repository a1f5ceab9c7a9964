"""The typed configuration of a run: what `dynmoe train` reads. Simple types only; one section per room.

Values that contradict one another are found by `dynmoe_ds.config.validate`, not here, so that all faults can be
reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.dispatch import DispatchConfig
from dynmoe_ds.routing.router import RouterConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """The kind of expert.

    With a gate and no biases: `swiglu` (as in Llama), `geglu`, `geglu_tanh` (Gemma). Two layers with biases: `gelu`
    (BERT, ViT), `gelu_tanh` (Phi, SigLIP), `quick_gelu` (CLIP).
    """

    kind: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaModelConfig:
    """A Llama-style decoder with random weights, some of whose MLPs are `MoELayer`s.

    From layer `moe_first` (from 0) on, every `moe_every`-th layer has experts. `moe_first` None is `moe_every` - 1: the
    last layer of every `moe_every`. `shared_ffn_hidden_size`: hidden units of one expert more in each of them, which
    all tokens pass; 0 for none. `tie_embeddings`: whether the output layer shares the weights of the embedding.
    """

    name: Literal["llama"] = "llama"
    hidden_size: int
    num_layers: int
    num_heads: int
    dense_ffn_hidden_size: int
    expert_ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    moe_every: int
    moe_first: int | None = None
    num_experts: int
    num_slots: int
    tie_embeddings: bool = True

    def moe_layers(self) -> range:
        """The layers with experts, from 0."""
        first = self.moe_every - 1 if self.moe_first is None else self.moe_first
        return range(first, self.num_layers, self.moe_every)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSizes:
    """The sizes of an encoder or decoder with random weights."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_hidden_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEncoderSizes(TransformerSizes):
    """The sizes of an encoder of images, cut into squares `patch_size` pixels wide."""

    patch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UpcycledConfig:
    """A Hugging Face encoder with a classifier, some of whose FFNs become `MoELayer`s of copies (`dynmoe_ds.upcycle`).

    pretrained: the folder of its weights, which says its sizes; None for random weights of `sizes`. dropout: of hidden
    states and attention. moe_layers: counted from 0; negative ones from the end.
    """

    pretrained: str | None
    dropout: float
    moe_layers: tuple[int, ...]
    num_experts: int
    num_slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BertClassifierConfig(UpcycledConfig):
    """BERT with a classifier, or a regression, on its first token."""

    name: Literal["bert_classifier"] = "bert_classifier"
    sizes: TransformerSizes | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTClassifierConfig(UpcycledConfig):
    """A vision transformer (ViT, or DeiT without a distillation token) with a classifier on its first token."""

    name: Literal["vit_classifier"] = "vit_classifier"
    sizes: ImageEncoderSizes | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaModelConfig:
    """A vision tower, a projector and a language model (transformers' Llava).

    vision_pretrained, text_pretrained: folders of the weights of a CLIP or SigLIP tower and of a decoder, which say
    their sizes; None for random weights of `vision_sizes` (CLIP) and `text_sizes` (Llama). In a stage with experts
    (`StageConfig`) the FFNs of the language model's `moe_layers` become `MoELayer`s of copies (`dynmoe_ds.upcycle`):
    a word, or numbers of layers as in `UpcycledConfig`.
    """

    name: Literal["llava"] = "llava"
    vision_pretrained: str | None
    vision_sizes: ImageEncoderSizes | None
    text_pretrained: str | None
    text_sizes: TransformerSizes | None
    moe_layers: Literal["all", "even", "odd", "first_half", "second_half"] | tuple[int, ...]
    num_experts: int
    num_slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDataConfig:
    """Text for language modelling. `name` is `pydoc_topics` (comes with CPython) or `text_file` (`path` required)."""

    name: Literal["pydoc_topics", "text_file"]
    vocab_size: int
    sequence_length: int
    held_out_every: int
    path: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenShardsConfig:
    """Pre-tokenised text for language modelling: `path` is a folder that `dynmoe tokenize` wrote.

    Held out are either the last `held_out_windows` windows of `sequence_length` tokens, or the shards (file names) of
    `held_out_shards`.
    """

    name: Literal["token_shards"] = "token_shards"
    path: str | None
    sequence_length: int
    held_out_windows: int | None
    held_out_shards: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronIndexedConfig:
    """Megatron's indexed data sets for language modelling, which need the extra `megatron`.

    paths: a data set each, without `.bin` or `.idx`. weights: the share of the windows of `sequence_length` tokens that
    each contributes, in any unit; empty to read every window once per epoch. tokenizer: the folder of the tokenizer
    that made them (or its file). held_out_fraction: of each data set's documents; the last ones.
    """

    name: Literal["megatron_indexed"] = "megatron_indexed"
    paths: tuple[str, ...]
    weights: tuple[float, ...] = ()
    tokenizer: str | None
    sequence_length: int
    held_out_fraction: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GlueDataConfig:
    """One task of GLUE: `path` is the folder of its download, `tokenizer` that of a pretrained model (or its file).

    sequence_length: tokens after which a row is cut off. num_train: rows of the training file, from which epochs are
    computed; the data must have as many.
    """

    name: Literal["glue"] = "glue"
    task: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    path: str | None
    tokenizer: str | None
    sequence_length: int
    num_train: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolderConfig:
    """Images with classes, in `<path>/train/<class>` and `<path>/val/<class>`, `image_size` pixels wide and high.

    num_workers: see `LlavaDataConfig`.
    """

    name: Literal["image_folder"] = "image_folder"
    path: str | None
    image_size: int
    num_workers: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaDataConfig:
    """Conversations about images in LLaVA's JSON: `path` to learn from, `held_out_path` to evaluate on.

    image_folder: where the samples' images are. tokenizer: the folder of a pretrained language model, or its file.
    template: how a conversation becomes text: `plain` (images and captions), `vicuna`, or the tokenizer's `own`.
    sequence_length: tokens that a sample may have, images included; a longer one is broken. on_broken: whether broken
    samples (too long, without their images, malformed) are left out or stop the run. group: whether a step's samples
    are of one kind (with and without images) and of like lengths, but for an epoch's last ones. packing: whether
    training samples share rows of `sequence_length` tokens, without seeing one another; a batch is counted in rows
    then. num_workers: processes of each rank that make training batches ahead of time; 0: the rank itself makes them.
    """

    name: Literal["llava"] = "llava"
    path: str | None
    held_out_path: str | None
    image_folder: str | None
    tokenizer: str | None
    template: Literal["plain", "vicuna", "own"]
    image_size: int
    sequence_length: int
    on_broken: Literal["skip", "stop"]
    group: bool
    packing: bool = False
    num_workers: int = 0


# The sections `model` and `data` are of one of these kinds each. `name` tells which: another kind is another dataclass
# whose field `name` is a Literal of names that no other kind has.
ModelConfig: TypeAlias = LlamaModelConfig | BertClassifierConfig | ViTClassifierConfig | LlavaModelConfig
LanguageDataConfig: TypeAlias = TextDataConfig | TokenShardsConfig | MegatronIndexedConfig
DataConfig: TypeAlias = LanguageDataConfig | GlueDataConfig | ImageFolderConfig | LlavaDataConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up and a fall to `final_lr_fraction` of `lr`. No weight decay on thresholds and norms.

    implementation: whose kernels update the weights; `auto` takes apex's on GPUs where it is installed, else torch's.
    """

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    warmup_steps: int
    final_lr_fraction: float
    gradient_clipping: float
    lr_decay: Literal["cosine", "linear"] = "cosine"
    implementation: Literal["auto", "torch", "deepspeed_fused", "apex"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Ranks, layout and precision. `process_group_timeout_s` bounds how long a rank waits for a dead one.

    dispatch: how rows travel between the ranks that share a pool of experts.
    """

    num_ranks: int
    ep_size: int
    zero_stage: int
    dtype: Literal["float32", "bfloat16"]
    activation_checkpointing: Literal["none", "torch", "deepspeed"]
    process_group_timeout_s: int
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The loop. One step is one optimiser step; `micro_batch_size` is sequences per rank and micro step.

    eval_sequences: how many held-out examples are evaluated on; None for all. save_model: whether the trained model
    goes into the run folder, as `model/`, for `dynmoe_ds.load_model`. on_non_finite: what happens when NaN or infinity
    comes up on any rank: `stop` ends the run, `skip_step` leaves out that step's update, `roll_back` goes back to the
    latest checkpoint first, and leaves the update out only if the fault comes up again.
    """

    steps: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    log_every_steps: int
    eval_every_steps: int
    eval_sequences: int | None
    sample_prompt: str
    sample_tokens: int
    save_model: bool = True
    on_non_finite: Literal["stop", "skip_step", "roll_back"] = "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints of the training, in `checkpoints/` of the run folder, which all ranks must see.

    every_steps: optimiser steps between two; None for none. keep: how many of the newest stay. resume: `auto` goes on
    from the latest in the run folder where there is one, `never` refuses a run folder that is in use. asynchronous:
    whether they are written in the background.
    """

    every_steps: int | None = None
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"
    asynchronous: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """Where the numbers go beside the run folder's JSON lines.

    wandb_mode: of Weights & Biases. tensorboard: whether `tensorboard/` in the run folder has them, too. detail: which
    numbers these two get: `brief`, those that a person watches, or `detailed`, with the series of every layer and kind
    of tokens. What costs extra, such as the values of routers' controllers, is measured for `detailed` alone.
    """

    wandb_mode: Literal["offline", "online", "disabled"]
    wandb_project: str
    tensorboard: bool = False
    detail: Literal["brief", "detailed"] = "brief"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """A stage of vision-language training.

    trained: the parts that train, all others are frozen; `language_model` is all of it, `experts` the experts and
    routers of its MoELayers alone. has_experts: whether the language model has MoELayers. start: the folder of a model
    that another run left (`model/` in its run folder), whose weights this one starts from; None for the weights that
    the section `model` names.
    """

    trained: tuple[Literal["vision_tower", "projector", "language_model", "experts"], ...]
    has_experts: bool
    start: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run. `adaptation` None keeps the pool as it starts. `stage`: for vision-language models.

    run_dir: is created; it must be empty or absent, unless it is of a run that `checkpoint.resume` may go on with.
    """

    seed: int
    run_dir: str
    model: ModelConfig
    expert: ExpertConfig
    router: RouterConfig
    adaptation: AdaptationConfig | None
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    training: TrainingConfig
    telemetry: TelemetryConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stage: StageConfig | None = None
