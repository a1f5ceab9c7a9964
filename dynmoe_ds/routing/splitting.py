"""What a router sees of an expert that splits in two, and the threshold that halves a load."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitExpert:
    """One split. parent, child: the slots of the two halves. active [S] bool: the live slots, the child's included.

    hidden [N, D] float32 or wider: a sample of the tokens that the layer saw. chose_parent [N] bool: which of them went
    to the parent. N is 0 where nothing was sampled.
    """

    parent: int
    child: int
    active: Tensor
    hidden: Tensor
    chose_parent: Tensor


def halving_threshold(scores: Tensor, load: int) -> Tensor:
    """The threshold that `load // 2` of scores [N] pass, in the middle between the last that passes and the next.

    load: tokens of the parent among the N, at least 2. Equal scores at that place pass or fail together.
    """
    assert 2 <= load <= scores.numel(), (load, scores.numel())
    greatest = scores.topk(load // 2 + 1).values
    return greatest[-2:].mean()
