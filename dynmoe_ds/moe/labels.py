"""What is known of the tokens of a forward pass beside their hidden vectors, for the ledger that counts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from torch import Tensor

from dynmoe_ds.errors import RoutingError
from dynmoe_ds.routing import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLabels:
    """kinds [B, L] int64: of what kind each token is, negative for none. is_counted [B] bool: which sequences count."""

    kinds: Tensor | None = None
    is_counted: Tensor | None = None


_current: ContextVar[TokenLabels] = ContextVar("dynmoe_ds_token_labels", default=TokenLabels())  # noqa: B039 - frozen


@contextmanager
def labelled(*, kinds: Tensor | None = None, is_counted: Tensor | None = None) -> Iterator[None]:
    """Label the tokens of the forward passes inside the block; None keeps what an outer block says.

    The model computes the same; only what a `StepLedger` counts differs.
    """
    labels = _current.get()
    if kinds is not None:
        labels = replace(labels, kinds=kinds)
    if is_counted is not None:
        labels = replace(labels, is_counted=is_counted)
    token = _current.set(labels)
    try:
        yield
    finally:
        _current.reset(token)


def current_labels() -> TokenLabels:
    """The labels of the forward pass that is running."""
    return _current.get()


def counted_part(routing: Routing, real: Tensor | None, is_counted: Tensor) -> tuple[Routing, Tensor]:
    """A routing of T tokens and which of them are real [T], without the tokens of sequences that do not count.

    Raises: RoutingError where T tokens cannot be as many sequences as `is_counted` [B] has.
    """
    num_tokens, num_sequences = routing.mask.shape[0], is_counted.numel()
    if num_sequences == 0 or num_tokens % num_sequences:
        raise RoutingError(f"is_counted has {num_sequences} sequences, but a layer sees {num_tokens} tokens.")
    counts = is_counted.to(routing.mask.device).repeat_interleave(num_tokens // num_sequences)
    routing = routing._replace(mask=routing.mask & counts[:, None], unrouted=routing.unrouted & counts)
    return routing, counts if real is None else counts & real
