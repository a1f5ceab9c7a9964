"""Kinds of tokens and evaluation are counted exactly on every layout, and what is wrong is told on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError, DynMoEError, RoutingError
from dynmoe_ds.moe.ledger import in_backward
from dynmoe_ds.routing import BudgetConfig, RoutingRecords
from dynmoe_ds.routing.token_kinds import mean_k_per_kind
from tests.helpers.models import HIDDEN, TinyModel, batch, deepspeed_config, shard
from tests.helpers.spawn import run_ranks

KINDS = ("odd", "even", "rare")
SEQUENCES, LENGTH, STEPS, ACCUMULATE = 4, 6, 2, 2


def _labels(number: int) -> Tensor:
    """Kinds of the global batch [SEQUENCES, LENGTH]: -1 to 1, never `rare`."""
    return torch.randint(-1, 2, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(number))


def _mask(number: int) -> Tensor:
    """Attention mask of the global batch: sequences of 3 to 6 real tokens."""
    lengths = torch.randint(3, LENGTH + 1, (SEQUENCES, 1), generator=torch.Generator().manual_seed(50 + number))
    return (torch.arange(LENGTH) < lengths).long()


class _Watched:
    """Keeps (mask [T, S], kinds [T]) of every first pass through a layer; kinds of padding are -1."""

    def __init__(self, layer: dm.MoELayer) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.kinds = torch.zeros(0)
        layer.router.register_forward_hook(self._note)

    def _note(self, _: Any, args: tuple[Any, ...], routing: dm.Routing) -> None:
        if not in_backward():
            self.seen.append((routing.mask, self.kinds))


def _numbers(records: dict[str, RoutingRecords]) -> dict[str, Any]:
    return {
        name: {
            "num_tokens": int(record.num_tokens),
            "mean_k": record.mean_k,
            "tokens": record.statistics["tokens_per_kind"].tolist(),
            "mean_k_per_kind": mean_k_per_kind(record),
        }
        for name, record in records.items()
    }


def _observe(rank: int, world_size: int, ep_size: int, stage: int, is_checkpointed: bool) -> dict[str, Any]:
    wrap = partial(checkpoint, use_reentrant=False) if is_checkpointed else None
    model = TinyModel(ep_size, router="top_any", checkpoint=wrap)
    engine = dm.initialize(model, deepspeed_config(stage, accumulate=ACCUMULATE), token_kinds=KINDS)
    nothing = _numbers(engine.take_records())
    watched = {f"moe.{i}": _Watched(layer) for i, layer in enumerate(model.moe)}

    def forward(number: int, has_labels: bool = True) -> Tensor:
        tensors = (*(t.view(SEQUENCES, LENGTH, HIDDEN) for t in batch(number, SEQUENCES * LENGTH)), _labels(number))
        x, y, kinds = shard(tensors, rank, world_size)
        (mask,) = shard((_mask(number),), rank, world_size)
        for one in watched.values():
            one.kinds = torch.where(mask.bool(), kinds if has_labels else -1, -1).flatten()
        labels = {"token_kinds": kinds} if has_labels else {}
        return engine(x, y, attention_mask=mask, **labels)

    for number in range(STEPS * ACCUMULATE):
        # The last rank's data have no labels once: it must still send the same numbers as the others.
        engine.backward(forward(number, has_labels=(number, rank) != (1, world_size - 1)))
        engine.step()
    trained = _numbers(engine.take_records())
    seen_in_training = {name: one.seen for name, one in watched.items()}
    for one in watched.values():
        one.seen = []
    engine.eval()
    with torch.no_grad(), engine.evaluation_ledger() as ledger:
        forward(7)
        forward(8)
    evaluated = _numbers(engine.sum_over_ranks(ledger.records()))
    with torch.no_grad():
        forward(9)  # outside the block: recorded nowhere
    return {
        "nothing": nothing,
        "trained": trained,
        "seen_in_training": seen_in_training,
        "evaluated": evaluated,
        "seen_in_evaluation": {name: one.seen[:2] for name, one in watched.items()},
        "left": [int(record.num_tokens) for record in engine.take_records().values()],
    }


def _by_loop(seen: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    tokens, chosen = [0] * len(KINDS), [0] * len(KINDS)
    for mask, kinds in seen:
        for t, kind in enumerate(kinds.tolist()):
            if kind >= 0:
                tokens[kind] += 1
                chosen[kind] += int(mask[t].sum())
    means = [k / n if n else math.nan for k, n in zip(chosen, tokens, strict=True)]
    return {"tokens": tokens, "mean_k_per_kind": means}


LAYOUTS = {
    "one rank": (1, 1, 0, False),
    "two ranks, recomputed": (2, 1, 2, True),
    "EP 2": (2, 2, 1, False),
    "EP 2 at ZeRO-3, recomputed": (2, 2, 3, True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kinds_are_counted_as_by_a_loop(layout: str) -> None:
    world_size, *setting = LAYOUTS[layout]
    ranks = run_ranks(_observe, world_size, *setting)
    num_real = sum(int(_mask(number).sum()) for number in range(STEPS * ACCUMULATE))
    for phase, seen in (("trained", "seen_in_training"), ("evaluated", "seen_in_evaluation")):
        for name, numbers in ranks[0][phase].items():
            expected = _by_loop([one for rank in ranks for one in rank[seen][name]])
            assert numbers["tokens"] == expected["tokens"] and min(expected["tokens"][:2]) > 0
            assert numbers["mean_k_per_kind"] == pytest.approx(expected["mean_k_per_kind"], nan_ok=True)
            assert numbers["mean_k"] > 0
        assert all(str(rank[phase]) == str(ranks[0][phase]) for rank in ranks)
    assert all(numbers["num_tokens"] == num_real for numbers in ranks[0]["trained"].values())
    expected_tokens = int(_mask(7).sum() + _mask(8).sum())
    assert all(numbers["num_tokens"] == expected_tokens for numbers in ranks[0]["evaluated"].values())
    assert ranks[0]["left"] == [0, 0]
    assert [numbers["tokens"] for numbers in ranks[0]["nothing"].values()] == [[0.0] * len(KINDS)] * 2


def _message(act: Callable[[], Any]) -> str:
    try:
        act()
    except DynMoEError as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def _faults(rank: int, world_size: int) -> dict[str, str]:
    x, y = (t.view(SEQUENCES, LENGTH, HIDDEN) for t in batch(0, SEQUENCES * LENGTH))
    right = _labels(0)
    engine = dm.initialize(TinyModel(2), deepspeed_config(0), token_kinds=KINDS)

    def step_with(kinds: Tensor) -> dict[str, list[float]]:
        engine.backward(engine(x, y, token_kinds=kinds))
        engine.step()
        return {name: mean_k_per_kind(record) for name, record in engine.take_records().items()}

    none_declared = dm.initialize(TinyModel(2), deepspeed_config(0))
    return {
        "shape on rank 1": _message(lambda: step_with(right[:, :-1] if rank == 1 else right)),
        "kind on rank 0": _message(lambda: step_with(torch.full_like(right, 3) if rank == 0 else right)),
        "right again": _message(lambda: step_with(right)),
        "int32": _message(lambda: engine(x, y, token_kinds=right.int())),
        "list": _message(lambda: engine(x, y, token_kinds=right.tolist())),
        "not declared": _message(lambda: none_declared(x, y, token_kinds=right)),
        "names differ": _message(
            lambda: dm.initialize(TinyModel(2), deepspeed_config(0), token_kinds=KINDS[: 2 + rank])
        ),
        "twice": _message(lambda: dm.initialize(TinyModel(2), deepspeed_config(0), token_kinds=("a", "a"))),
        "slash": _message(lambda: dm.initialize(TinyModel(2), deepspeed_config(0), token_kinds=("a/b", ""))),
        "a string": _message(lambda: dm.initialize(TinyModel(2), deepspeed_config(0), token_kinds="odd")),
    }


def test_what_is_wrong_with_kinds_is_told_on_every_rank() -> None:
    expected = {
        "shape on rank 1": (RoutingError, "another shape than the tokens in 1 forward passes", "Give int64"),
        "kind on rank 0": (RoutingError, f"{SEQUENCES * LENGTH} tokens have a kind above 2", "Name every kind"),
        "int32": (RoutingError, "token_kinds is torch.int32 but must be an int64 tensor"),
        "list": (RoutingError, "token_kinds is list but must be an int64 tensor"),
        "not declared": (RoutingError, "no kinds are declared", "dynmoe_ds.initialize(token_kinds"),
        "names differ": (DynMoEError, 'token_kinds is ["odd", "even"] on rank 0, ["odd", "even", "rare"] on rank 1.'),
        "twice": (ConfigError, "token_kinds is ['a', 'a'] but every name must be there once."),
        "slash": (ConfigError, "holds 'a/b'", "holds ''", "have no slash"),
        "a string": (ConfigError, "token_kinds is 'odd' but must be a sequence of names, such as ('odd',)."),
    }
    for messages in run_ranks(_faults, 2):
        assert messages.pop("right again") == "no error"
        assert messages.keys() == expected.keys()
        for name, (error_type, *words) in expected.items():
            assert error_type is DynMoEError or messages[name].startswith(error_type.__name__), messages[name]
            assert all(word in messages[name] for word in words), messages[name]


def _controllers(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    budget = BudgetConfig(target_k=1.5)
    engine = dm.initialize(TinyModel(1, router=dm.TopAnyConfig(budget=budget)), deepspeed_config(0))
    before = engine.observables()
    engine.backward(engine(*shard(batch(0, 16), rank, world_size)))
    engine.step()
    after = engine.observables()
    controls = {
        name: float(layer.router.budget.control) for name, layer in engine.module.named_modules() if name in after
    }
    assert all(values["budget_control"] == controls[name] for name, values in after.items())
    assert before != after
    return after


def test_the_values_of_controllers_are_equal_on_all_ranks() -> None:
    first, second = run_ranks(_controllers, 2)
    assert first == second and list(first) == ["moe.0", "moe.1"]
    assert all(values["budget_target"] == 1.5 and values["budget_control"] != 0 for values in first.values())
