"""Text for language modelling: read, split, tokenised, packed and dealt out to the ranks."""

from dynmoe_ds.data.order import HeldOutOrder, TrainingOrder
from dynmoe_ds.data.rank_zero import from_rank_zero
from dynmoe_ds.data.sequences import TokenSequences
from dynmoe_ds.data.text import TextData, load_text_data
from dynmoe_ds.data.tokenizer import END_OF_TEXT, end_of_text_id, save_tokenizer, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "HeldOutOrder",
    "TextData",
    "TokenSequences",
    "TrainingOrder",
    "end_of_text_id",
    "from_rank_zero",
    "load_text_data",
    "save_tokenizer",
    "train_tokenizer",
]
