"""The data of a run: read, split, tokenised, packed and dealt out to the ranks.

`data.processor` is not among what is imported here: it would double the time in which a worker process starts.
"""

from dynmoe_ds.data.conversations import BrokenSamples
from dynmoe_ds.data.examples import Examples, SlowExamples
from dynmoe_ds.data.glue import GlueData, load_glue_data
from dynmoe_ds.data.image_folder import ImageFolderData, load_image_folder
from dynmoe_ds.data.image_statistics import ImageStatistics, read_image_statistics
from dynmoe_ds.data.llava import (
    ConversationData,
    ConversationExamples,
    ImageInput,
    load_conversations,
    modality_of,
    read_picture,
)
from dynmoe_ds.data.loading import BatchLoader
from dynmoe_ds.data.megatron_indexed import BlendedWindows, MegatronIndexedData, load_megatron_indexed
from dynmoe_ds.data.order import Grouping, HeldOutOrder, TrainingOrder
from dynmoe_ds.data.pretrained_tokenizer import load_pretrained_tokenizer
from dynmoe_ds.data.rank_zero import from_rank_zero
from dynmoe_ds.data.sequences import TokenSequences
from dynmoe_ds.data.shard_writer import write_token_shards
from dynmoe_ds.data.text import TextData, load_text_data
from dynmoe_ds.data.token_shards import TokenShardData, TokenWindows, load_token_shards
from dynmoe_ds.data.tokenizer import END_OF_TEXT, end_of_text_id, save_tokenizer, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "BatchLoader",
    "BlendedWindows",
    "BrokenSamples",
    "ConversationData",
    "ConversationExamples",
    "Examples",
    "GlueData",
    "Grouping",
    "HeldOutOrder",
    "ImageFolderData",
    "ImageInput",
    "ImageStatistics",
    "MegatronIndexedData",
    "SlowExamples",
    "TextData",
    "TokenSequences",
    "TokenShardData",
    "TokenWindows",
    "TrainingOrder",
    "end_of_text_id",
    "from_rank_zero",
    "load_conversations",
    "load_glue_data",
    "load_image_folder",
    "load_megatron_indexed",
    "load_pretrained_tokenizer",
    "load_text_data",
    "load_token_shards",
    "modality_of",
    "read_image_statistics",
    "read_picture",
    "save_tokenizer",
    "train_tokenizer",
    "write_token_shards",
]
