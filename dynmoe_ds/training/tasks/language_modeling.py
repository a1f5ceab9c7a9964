"""Next-token prediction: a decoder with random weights learns to continue text."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dynmoe_ds.config.schema import (
    LanguageDataConfig,
    MegatronIndexedConfig,
    RunConfig,
    TextDataConfig,
    TokenShardsConfig,
)
from dynmoe_ds.data import (
    Examples,
    MegatronIndexedData,
    TextData,
    TokenShardData,
    load_megatron_indexed,
    load_text_data,
    load_token_shards,
    save_tokenizer,
)
from dynmoe_ds.errors import DataError
from dynmoe_ds.models import build_decoder
from dynmoe_ds.training.engine import TrainingEngine
from dynmoe_ds.training.evaluation import held_out_loss, held_out_order
from dynmoe_ds.training.generation import generate

TOKENIZER_FOLDER = "tokenizer"
SAMPLE_TEMPERATURE = 0.8


class LanguageModeling:
    """The task of text. It reports `eval/loss`, keeps the tokenizer and ends with a sample of generated text.

    Collective: construction, which loads the data. Raises: DataError, on every rank, for data that cannot be used.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        assert isinstance(config.data, LanguageDataConfig), type(config.data).__name__
        self.data = _load(config.data)
        if config.training.sample_tokens > 0 and self.data.tokenizer() is None:
            assert isinstance(config.data, TokenShardsConfig), "all other data come with a tokenizer"
            raise DataError(
                f"training.sample_tokens is {config.training.sample_tokens}, but {config.data.path} has no "
                "tokenizer.json to write text with. Put it there, or set training.sample_tokens=0."
            )

    @property
    def train(self) -> Examples:
        return self.data.train

    @property
    def num_held_out(self) -> int:
        return len(self.data.held_out)

    @property
    def tokens_per_example(self) -> int:
        return self.data.train.length

    @property
    def grouping(self) -> None:
        return None

    @property
    def token_kinds(self) -> tuple[str, ...]:
        return ()

    @property
    def left_out(self) -> None:
        return None

    def build_model(self) -> nn.Module:
        return build_decoder(self.config, self.data.vocab_size, self.data.end_of_text)

    def evaluate(self, engine: TrainingEngine) -> dict[str, float]:
        order = held_out_order(self.config.training, self.num_held_out)
        return {"eval/loss": held_out_loss(engine, self.data.held_out, order)}

    def write_files(self, folder: Path) -> None:
        tokenizer = self.data.tokenizer()
        if tokenizer is not None:
            end_of_text = tokenizer.id_to_token(self.data.end_of_text)
            assert end_of_text is not None, f"the tokenizer has no id {self.data.end_of_text}"
            save_tokenizer(tokenizer, folder / TOKENIZER_FOLDER, end_of_text)

    def sample(self, engine: TrainingEngine) -> str | None:
        """What the model writes on from `training.sample_prompt`."""
        training, tokenizer = self.config.training, self.data.tokenizer()
        if training.sample_tokens == 0 or tokenizer is None:
            return None
        ids = generate(
            engine,
            tokenizer.encode(training.sample_prompt).ids,
            num_tokens=training.sample_tokens,
            context_length=self.data.train.length,
            temperature=SAMPLE_TEMPERATURE,
            seed=self.config.seed,
            stop_token=self.data.end_of_text,
        )
        return tokenizer.decode(ids) + "\n"


def _load(config: LanguageDataConfig) -> TextData | TokenShardData | MegatronIndexedData:
    match config:
        case TextDataConfig():
            return load_text_data(config)
        case TokenShardsConfig():
            return load_token_shards(config)
        case MegatronIndexedConfig():
            return load_megatron_indexed(config)
