"""Token sequences of one fixed length, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dynmoe_ds.data.tokenizer import end_of_text_id


class TokenSequences:
    """N sequences of L tokens, held as `tokens` [N, L] int32."""

    def __init__(self, tokens: Tensor) -> None:
        assert tokens.dim() == 2, f"tokens must be [N, L] but is {list(tokens.shape)}"
        self.tokens = tokens.to(torch.int32)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """L, in tokens."""
        return self.tokens.shape[1]

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu", epochs: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """`input_ids` and `labels`, both [len(indices), L] int64 and equal: the model shifts the labels itself."""
        tokens = self.tokens[list(indices)].to(device=device, dtype=torch.int64)
        return {"input_ids": tokens, "labels": tokens}


def pack(documents: Sequence[str], tokenizer: Tokenizer, sequence_length: int) -> TokenSequences:
    """The documents end to end, each closed by END_OF_TEXT, cut into sequences of `sequence_length` tokens.

    A sequence may span documents. The last tokens that fill no sequence are dropped; there may be no sequence at all.
    """
    end = end_of_text_id(tokenizer)
    ids = [torch.tensor([*encoding.ids, end], dtype=torch.int32) for encoding in tokenizer.encode_batch(documents)]
    stream = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32)
    num_sequences = stream.numel() // sequence_length
    return TokenSequences(stream[: num_sequences * sequence_length].reshape(num_sequences, sequence_length))
