"""Conversations in LLaVA's JSON that a saved vision-language model is evaluated on, whatever it learned from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from dynmoe_ds.config.schema import LlavaDataConfig
from dynmoe_ds.data import HeldOutOrder, load_conversations
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.training.engine import TrainingEngine
from dynmoe_ds.training.saved_run import SavedRun
from dynmoe_ds.training.tasks.vision_language import answer_metrics
from dynmoe_ds.training.writer import Writer

_BATCH = 8


class HeldOutConversations:
    """The conversations of `file`, for `SavedRun.evaluate`; their images are in `image_folder`.

    Raises: ConfigError for a model of text; DataError for files that cannot be used, and broken samples.
    """

    def __init__(self, run: SavedRun, file: str | Path, image_folder: str | Path | None) -> None:
        writer = Writer(run)
        form, tokenizer = writer.form, writer.tokenizer
        if form is None:
            raise ConfigError(f"{run.folder} holds a model of text. Conversations need a vision-language model.")
        config: Any = run.model.config
        data = LlavaDataConfig(
            path=f"{file}",  # nothing is learned; data have two files
            held_out_path=f"{file}",
            image_folder=None if image_folder is None else f"{image_folder}",
            tokenizer=None,
            template=form.template,
            image_size=form.image.size,
            sequence_length=config.get_text_config().max_position_embeddings,
            on_broken="stop",
            group=False,
        )
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._examples = load_conversations(data, tokenizer, form.image, form.image_token_id, pad).held_out

    @property
    def token_kinds(self) -> tuple[str, ...]:
        return self._examples.token_kinds

    @cached_property
    def tokens_per_example(self) -> int:
        """The mean, images included, without padding."""
        return round(float(self._examples.lengths().mean()))

    def evaluate(self, engine: TrainingEngine) -> dict[str, float]:
        order = HeldOutOrder(num_sequences=len(self._examples), micro_batch_size=_BATCH, rank=0, world_size=1)
        return answer_metrics(engine, self._examples, order)
