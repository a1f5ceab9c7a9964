"""A vision-language model learns to answer about images, in stages."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynmoe_ds.config.schema import LlavaDataConfig, LlavaModelConfig, RunConfig
from dynmoe_ds.data import (
    BrokenSamples,
    ConversationExamples,
    Grouping,
    HeldOutOrder,
    ImageInput,
    ImageStatistics,
    TrainingOrder,
    load_conversations,
    load_pretrained_tokenizer,
    read_image_statistics,
)
from dynmoe_ds.data.chat import IGNORED
from dynmoe_ds.distributed import attempt_together
from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.export import load_model
from dynmoe_ds.models import (
    Vocabulary,
    build_vision_language,
    check_packing,
    finish_vision_language,
    llava_backbone,
    tokens_per_image,
)
from dynmoe_ds.moe import labelled
from dynmoe_ds.training.engine import TrainingEngine
from dynmoe_ds.training.evaluation import eval_mode, held_out_batch, held_out_order, token_losses

TOKENIZER_FOLDER = "tokenizer"
INPUT_FILE = "vision_language.json"
IMAGE_TOKEN = "<image>"
# How images are normalised where the tower's folder does not say, by its type; CLIP's numbers are of its own images.
NORMALISATION = {
    "clip_vision_model": ImageStatistics(
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
    ),
    "siglip_vision_model": ImageStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
}

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_MUST_AGREE = [("", "image_token_id"), ("", "image_seq_length")]
_MUST_AGREE += [(part, key) for part in ("text_config", "vision_config") for key in _SIZES]

logger = logging.getLogger(__name__)


class VisionLanguage:
    """Conversations about images. It reports `eval/loss` per learned token and `eval/exact_match` per sample.

    A sample matches if each learned token is the model's first choice after the right ones before: if greedy decoding
    would write its answers, each after the right history.
    Collective: construction, which loads data and configurations. Raises: DataError or ConfigError, on every rank, for
    data that cannot be used, or that a pretrained model cannot take.
    """

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.data, LlavaDataConfig), type(config.data).__name__
        assert isinstance(config.model, LlavaModelConfig), type(config.model).__name__
        assert config.stage is not None, "checked with the configuration"
        self.config, self.stage = config, config.stage
        folder = config.data.tokenizer
        self.tokenizer = attempt_together(lambda: load_pretrained_tokenizer(folder, needs_padding=False))
        vocabulary = attempt_together(lambda: vocabulary_of(self.tokenizer))
        self.backbone: LlavaConfig = llava_backbone(
            config.model, vocabulary, image_size=config.data.image_size, max_length=config.data.sequence_length
        )
        statistics = _statistics(config.model, self.backbone)
        self.image = ImageInput(
            size=config.data.image_size, num_tokens=tokens_per_image(self.backbone), **asdict(statistics)
        )
        self.data = load_conversations(
            config.data, self.tokenizer, self.image, vocabulary.image_token_id, vocabulary.pad_token_id
        )

    @cached_property
    def train(self) -> ConversationExamples:
        data = self.config.data
        assert isinstance(data, LlavaDataConfig)
        samples = self.data.train
        return (
            samples.packed(data.sequence_length, self.config.seed, is_grouped=data.group) if data.packing else samples
        )

    @property
    def num_held_out(self) -> int:
        return len(self.data.held_out)

    @cached_property
    def grouping(self) -> Grouping | None:
        return self._grouping(self.train)

    def _grouping(self, examples: ConversationExamples) -> Grouping | None:
        assert isinstance(self.config.data, LlavaDataConfig)
        return examples.grouping() if self.config.data.group else None

    @cached_property
    def tokens_per_example(self) -> int:
        """The mean, images included, without padding."""
        return round(float(self.train.lengths().mean()))

    @property
    def token_kinds(self) -> tuple[str, ...]:
        return self.data.train.token_kinds

    @property
    def left_out(self) -> BrokenSamples | None:
        return self.train.left_out if self.train.on_broken == "skip" else None

    def build_model(self) -> nn.Module:
        model = self._start()
        assert isinstance(self.config.data, LlavaDataConfig)
        if self.config.data.packing:
            check_packing(model)
        finish_vision_language(model, self.config)
        if not dist.is_initialized() or dist.get_rank() == 0:
            _announce_trained(model, self.stage.trained)
            self._announce_padding()
        return model

    def _announce_padding(self) -> None:
        """Say how much of the first epoch's batches is padding, and what packing changes."""
        share, samples = self._padding(self.train), self.data.train
        if self.train is samples:
            logger.info("Padding is %.1f %% of a batch's tokens", 100 * share)
            return
        logger.info(
            "%d samples are packed into %d rows: padding is %.1f %% of a batch's tokens, %.1f %% without packing",
            *(len(samples), len(self.train), 100 * share, 100 * self._padding(samples)),
        )

    def _padding(self, examples: ConversationExamples) -> float:
        training = self.config.training
        order = TrainingOrder(
            seed=self.config.seed,
            num_sequences=len(examples),
            micro_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            rank=0,
            world_size=self.config.parallel.num_ranks,
            grouping=self._grouping(examples),
        )
        return order.padding_share(examples.lengths())

    def _start(self) -> LlavaForConditionalGeneration:
        """The model that the stage starts from, float32."""
        if self.stage.start is None:
            return build_vision_language(self.config, self.backbone)
        start, parallel, sizes = self.stage.start, self.config.parallel, self.config.model
        return attempt_together(lambda: self._checked(load_model(start, parallel.ep_size, sizes.num_slots)).train())

    def _checked(self, model: nn.Module) -> LlavaForConditionalGeneration:
        """`model` in float32. Raises: ConfigError if it is not what this run's sections describe."""
        if not isinstance(model, LlavaForConditionalGeneration):
            raise ConfigError(
                f"stage.start is {self.stage.start}, which holds a {type(model).__name__} where a Llava is needed. "
                "Name the folder `model` in the run folder of the stage before."
            )
        for part, key in _MUST_AGREE:
            theirs, ours = (getattr(getattr(c, part) if part else c, key) for c in (model.config, self.backbone))
            if theirs != ours:
                name = f"{part}.{key}" if part else key
                raise ConfigError(
                    f"stage.start is {self.stage.start}, whose {name} is {theirs}, but the sections model and data "
                    f"make it {ours}. Use the settings of the run that left it."
                )
        return model.float()

    def evaluate(self, engine: TrainingEngine) -> dict[str, float]:
        return answer_metrics(engine, self.data.held_out, held_out_order(self.config.training, self.num_held_out))

    def write_files(self, folder: Path) -> None:
        """The tokenizer, and how questions and images become input."""
        assert isinstance(self.config.data, LlavaDataConfig)
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        write_input(folder, self.config.data.template, self.image, self.backbone.image_token_id)

    def sample(self, engine: TrainingEngine) -> str | None:
        return None


def write_input(folder: Path, template: str, image: ImageInput, image_token_id: int) -> None:
    """Write how questions and images become a model's input, for `Writer`."""
    told = {
        "template": template,
        "image_size": image.size,
        "tokens_per_image": image.num_tokens,
        "image_token_id": image_token_id,
        "mean": image.mean,
        "std": image.std,
        "resample": image.resample,
    }
    (folder / INPUT_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def answer_metrics(engine: TrainingEngine, examples: ConversationExamples, order: HeldOutOrder) -> dict[str, float]:
    """`eval/loss`, `eval/exact_match`, and the latter by kind of sample. Collective: as `answer_losses`."""
    index, losses, num_tokens, is_exact = answer_losses(engine, examples, order).unbind(1)
    values = {
        "eval/loss": float(losses.sum() / num_tokens.sum()),
        "eval/exact_match": float(is_exact.mean()),
    }
    kinds = [examples.samples[int(i)].kind for i in index]
    for kind in sorted({kind for kind in kinds if kind is not None}):
        is_of_kind = torch.tensor([kind == other for other in kinds])
        values[f"eval/exact_match/{kind}"] = float(is_exact[is_of_kind].mean())
    return values


def answer_losses(engine: TrainingEngine, examples: ConversationExamples, order: HeldOutOrder) -> Tensor:
    """Of every example once, in their order: [N, 4] float64 on the CPU, equal on all ranks.

    The columns are its index, the summed cross entropy of its learned tokens in nats, their number, and 1 if each of
    them is the model's first choice.
    Collective: every rank, each with its own `order`; all run the same number of forwards. Raises: as `held_out_batch`.
    """
    rows = []
    with eval_mode(engine):
        for indices, weights in order:
            batch = held_out_batch(examples, indices, engine.device)
            labels = batch.pop("labels")
            is_counted = torch.tensor(weights, device=engine.device) > 0
            with labelled(is_counted=is_counted):
                logits = engine(**batch).logits
            is_learned = labels[:, 1:] != IGNORED
            is_wrong = is_learned & (logits[:, :-1].argmax(-1) != labels[:, 1:])
            columns = (
                is_counted,
                torch.tensor(indices, device=engine.device),
                token_losses(logits, labels).sum(1),
                is_learned.sum(1),
                ~is_wrong.any(1),
            )
            rows.append(torch.stack([column.double() for column in columns], dim=1))
    table = _of_all_ranks(torch.cat(rows)).cpu()
    table = table[table[:, 0] > 0]  # repeats that fill the last batches count for nothing
    return table[table[:, 1].argsort()][:, 1:]


def _of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of every rank, equally many on each. Collective: every rank."""
    if not dist.is_initialized():
        return rows
    everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, rows)
    return torch.cat(everyone)


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, key: str = "data.tokenizer") -> Vocabulary:
    """What the model must know; a tokenizer without an image token gets one beyond its end.

    key: what the user calls it. Raises: DataError for one without an end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{key} names no end-of-text token (eos_token). Use the folder of a language model.")
    vocabulary = tokenizer.get_vocab()
    known, end = vocabulary.get(IMAGE_TOKEN), max(vocabulary.values()) + 1  # there may be gaps
    return Vocabulary(
        size=end + (known is None),
        image_token_id=end if known is None else known,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        end_token_id=tokenizer.eos_token_id,
    )


def _statistics(model: LlavaModelConfig, backbone: LlavaConfig) -> ImageStatistics:
    """How images are normalised; rank 0 says why. Collective: every rank. Raises: ConfigError on every rank."""
    folder, size, kind = model.vision_pretrained, backbone.vision_config.image_size, backbone.vision_config.model_type
    found = attempt_together(lambda: None if folder is None else read_image_statistics(folder, size))
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("Images are normalised as %s.", f"{folder} says" if found else f"is usual for a {kind}")
    return found or NORMALISATION[kind]


def _announce_trained(model: nn.Module, parts: Sequence[str]) -> None:
    """Say what trains, the same parameter of several layers as one. Sizes are of this rank's share of the experts."""
    total = sum(param.numel() for param in model.parameters())
    trained = {name: param.numel() for name, param in model.named_parameters() if param.requires_grad}
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in trained)
    logger.info(
        "Training %s: %.2fM of %.2fM parameters on this rank, which are %s",
        ", ".join(parts),
        sum(trained.values()) / 1e6,
        total / 1e6,
        ", ".join(f"{count} x {name}" for name, count in counts.items()),
    )
