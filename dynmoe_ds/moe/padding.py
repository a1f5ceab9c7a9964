"""Telling the layers inside a model which tokens are padding."""

from __future__ import annotations

import logging
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynmoe_ds.errors import RoutingError
from dynmoe_ds.moe.ledger import in_backward

_log = logging.getLogger(__name__)


class PaddingMask:
    """The `attention_mask` [B, L] of the model's current forward pass, shared by its `MoELayer`s.

    An MLP inside a Hugging Face decoder is called with hidden states alone, so the mask is taken where it enters the
    model. It stays until the next forward pass, because activation checkpointing recomputes after the model has
    returned, and recomputation must see the same padding.

    Only a mask with a column per token says which tokens are padding. Any other form, such as [B, 1, L, L], may as well
    hide tokens from one another (packed documents): it counts as no padding, which is said once in the log.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._is_waiting = False  # a forward pass of training waits for its backward pass
        self._is_ambiguous = False  # and another forward pass with another mask came after it
        self._warned: set[str] = set()

    def watch(self, model: nn.Module) -> RemovableHandle:
        """Take the mask from every call of `model`, until the handle is removed."""
        return model.register_forward_pre_hook(self._on_forward, with_kwargs=True)

    def backward_done(self) -> None:
        """Forget that earlier forward passes still wait for their backward pass."""
        self._is_waiting = self._is_ambiguous = False
        self._mask = None

    def for_hidden(self, shape: tuple[int, ...]) -> Tensor | None:
        """The mask as bool for hidden states of leading shape [B, L], None where there is none that fits.

        When decoding with a cache the mask [B, cached + L] covers earlier tokens too: its last L columns count.
        Raises: RoutingError when a checkpoint recomputes and it is not known with which mask.
        """
        if self._is_ambiguous and in_backward():
            raise RoutingError(
                "Activation checkpointing recomputes a forward pass that others with different padding have followed, "
                "so it is not known which padding to use. Call backward after each forward, or pass token_mask to the "
                "layer."
            )
        if self._mask is None:
            return None
        rows, columns = self._mask.shape
        if len(shape) != 2 or shape[0] != rows or not 0 < shape[1] <= columns:
            self._warn_once(
                f"The model got an attention_mask of shape {tuple(self._mask.shape)} but a MoELayer sees tokens of "
                f"shape {shape}: padding is routed there like real tokens. Pass token_mask to the layer.",
                kind="shape of the hidden states",
            )
            return None
        return self._mask[:, columns - shape[1] :].bool()

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = _argument("attention_mask", model, args, kwargs)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            form = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            self._warn_once(
                f"The model got an attention_mask of {form}, which does not say which tokens are padding: all are "
                "routed and counted as real. If there is padding, pass a mask of shape [B, L], or token_mask to the "
                "layer.",
                kind="form of the mask",
            )
            mask = None
        self._is_ambiguous = self._is_ambiguous or (self._is_waiting and mask is not self._mask)
        self._is_waiting = self._is_waiting or (model.training and torch.is_grad_enabled())
        self._mask = mask

    def _warn_once(self, message: str, *, kind: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning(message)


def _argument(name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call of `model` gives for a parameter of its forward, by name or by position; None if nothing."""
    if name in kwargs:
        return kwargs[name]
    names = list(signature(model.forward).parameters)
    return args[names.index(name)] if name in names[: len(args)] else None
