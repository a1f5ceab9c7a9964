"""How many rows a token sends to other ranks, in closed form.

A token's row goes once to every rank, or with two legs once to every node and from there once to every rank, that has
one of its experts. So what counts is how many groups of m of the E live experts a token needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from dynmoe_ds.planning.layout import Layout
from dynmoe_ds.planning.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class SentPerToken:
    """What one token's dispatch sends from its rank to others, forwards, on average and per layer.

    rows_within, rows_between: rows over links within a node and between nodes. entries_within, entries_between: pairs
    of row and expert that go with them, each a combine weight.
    """

    rows_within: float
    rows_between: float
    entries_within: float
    entries_between: float


def need_of_group(model: ModelShape, num_groups: int) -> float:
    """The probability that a token needs a given one of `num_groups` equal groups of slots, averaged over the groups.

    With m of E live experts in the group, for exactly k experts per token, all sets of k equally likely,
    `P = 1 − C(E − m, k) / C(E, k) = 1 − Π_{i<k} (E − m − i) / (E − i)`; where every expert is chosen by itself with
    probability k/E, `P = 1 − (1 − k/E)^m`. Where m is no whole number, as many groups have one expert more than the
    others as make the mean.
    """
    experts = model.num_experts
    lower, more = floor(experts / num_groups), experts / num_groups % 1
    return (1 - more) * _need(model, lower) + more * _need(model, lower + 1)


def _need(model: ModelShape, in_group: int) -> float:
    experts, k = model.num_experts, min(model.mean_k, model.num_experts)
    if not model.is_exact_k:
        return 1.0 - (1.0 - k / experts) ** in_group
    miss = 1.0
    for i in range(round(k)):
        miss *= max(experts - in_group - i, 0) / (experts - i)
    return 1.0 - miss


def sent_per_token(model: ModelShape, layout: Layout) -> SentPerToken:
    """Rows and entries per token and layer under even loads.

    With one leg a token sends (n − 1) P rows to the n − 1 other ranks, P being the probability that it needs a rank
    (R P − P in the notation of the deduplicated form, where 1/R of all R P rows stay). With two legs it crosses to
    (nodes − 1) P_node nodes; on arrival a row goes to the ranks of the node that need it. As many rows arrive at a rank
    as leave it, so that per token n P rows are handed out within a node, of which a share 1/r stays on the rank.
    Entries are spread evenly over ranks, so that the same shares of k entries travel.
    """
    n, k = layout.ep_size, min(model.mean_k, model.num_experts)
    rank = need_of_group(model, n)
    per_node = min(layout.ranks_per_node, n)
    nodes = n // per_node
    if nodes == 1 or not layout.by_node:
        outside = n - per_node
        return SentPerToken(
            rows_within=(per_node - 1) * rank,
            rows_between=outside * rank,
            entries_within=k * (per_node - 1) / n,
            entries_between=k * outside / n,
        )
    return SentPerToken(
        rows_within=n * rank * (1 - 1 / per_node),
        rows_between=(nodes - 1) * need_of_group(model, nodes),
        entries_within=k * (1 - 1 / per_node),
        entries_between=k * (nodes - 1) / nodes,
    )
