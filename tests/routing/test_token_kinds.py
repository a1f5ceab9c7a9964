import math

import pytest
import torch

from dynmoe_ds.errors import RoutingError
from dynmoe_ds.moe.labels import counted_part
from dynmoe_ds.routing import Routing, RoutingRecords
from dynmoe_ds.routing.records import pack, unpack
from dynmoe_ds.routing.token_kinds import count_kinds, kind_shapes, mean_k_per_kind

NUM_KINDS = 3


def example(num_tokens: int = 200, num_slots: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mask [T, S] that is empty on padding, real [T] and kinds [T] from -1 to 2, at random."""
    g = torch.Generator().manual_seed(0)
    real = torch.rand(num_tokens, generator=g) < 0.8
    mask = (torch.rand(num_tokens, num_slots, generator=g) < 0.4) & real[:, None]
    return mask, real, torch.randint(-1, NUM_KINDS, (num_tokens,), generator=g)


def record_of(statistics: dict[str, torch.Tensor]) -> RoutingRecords:
    empty = RoutingRecords.zeros(5, 2, {}, torch.device("cpu"))
    return empty + RoutingRecords(**{name: getattr(empty, name) for name in _FIELDS}, statistics=statistics)


_FIELDS = ("tokens_per_slot", "num_tokens", "num_assignments", "num_unrouted", "unrouted_sum")


def test_counts_are_those_of_a_loop():
    mask, real, kinds = example()
    tokens, assignments = [0] * NUM_KINDS, [0] * NUM_KINDS
    for t in range(len(real)):
        if real[t] and kinds[t] >= 0:
            tokens[kinds[t]] += 1
            assignments[kinds[t]] += int(mask[t].sum())
    statistics = count_kinds(mask, real, kinds, NUM_KINDS, (200,))
    assert statistics["tokens_per_kind"].tolist() == tokens
    assert statistics["assignments_per_kind"].tolist() == assignments
    assert {name: tuple(value.shape) for name, value in statistics.items()} == kind_shapes(NUM_KINDS)
    assert all(value.dtype == torch.float64 for value in statistics.values())
    assert mean_k_per_kind(record_of(statistics)) == [k / n for k, n in zip(assignments, tokens, strict=True)]


def test_without_padding_every_token_counts():
    mask, _, kinds = example()
    counts = count_kinds(mask, None, kinds, NUM_KINDS, (200,))["tokens_per_kind"]
    assert counts.tolist() == [int((kinds == kind).sum()) for kind in range(NUM_KINDS)]


@pytest.mark.parametrize("shape", [(20, 10), (200,)], ids=["as the batch", "flattened by the model"])
def test_labels_of_a_batch_fit_its_tokens(shape):
    mask, real, kinds = example()
    of_batch = count_kinds(mask, real, kinds.view(20, 10), NUM_KINDS, shape)
    assert torch.equal(
        of_batch["tokens_per_kind"], count_kinds(mask, real, kinds, NUM_KINDS, (200,))["tokens_per_kind"]
    )


def test_nothing_is_counted_without_labels_or_without_kinds():
    mask, real, kinds = example()
    assert count_kinds(mask, real, kinds, 0, (200,)) == {} == kind_shapes(0)
    statistics = count_kinds(mask, real, None, NUM_KINDS, (200,))
    assert all(not value.any() for value in statistics.values())
    assert statistics.keys() == kind_shapes(NUM_KINDS).keys()
    assert mean_k_per_kind(record_of({})) == []


def test_a_kind_without_tokens_has_no_mean_and_no_tokens_at_all_is_fine():
    mask, real, kinds = example()
    means = mean_k_per_kind(record_of(count_kinds(mask, real, kinds.clamp(max=1), NUM_KINDS, (200,))))
    assert math.isnan(means[2]) and not math.isnan(means[1])
    nothing = count_kinds(mask[:0], None, kinds[:0].view(0, 10), NUM_KINDS, (0, 10))
    assert all(math.isnan(mean) for mean in mean_k_per_kind(record_of(nothing)))


@pytest.mark.parametrize("shape", [(10, 20), (200, 1), (199,), (4, 5, 10)])
def test_labels_of_another_shape_are_an_error_where_they_are_read(shape):
    mask, real, kinds = example()
    right = record_of(count_kinds(mask, real, kinds.view(20, 10), NUM_KINDS, (20, 10)))
    wrong = record_of(count_kinds(mask, real, kinds.view(20, 10), NUM_KINDS, shape))
    with pytest.raises(RoutingError, match=r"had another shape than the tokens in 2 forward passes .* Give int64"):
        mean_k_per_kind(right + wrong + wrong)


def test_a_kind_that_nobody_declared_is_an_error_where_it_is_read():
    mask, real, kinds = example()
    record = record_of(count_kinds(mask, real, kinds + 1, NUM_KINDS, (200,)))
    undeclared = int(((kinds == 2) & real).sum())
    with pytest.raises(
        RoutingError, match=rf"^{undeclared} tokens have a kind above 2, but 3 kinds are declared. Name"
    ):
        mean_k_per_kind(record)
    padding_may_hold_anything = kinds.masked_fill(~real, 99)
    assert len(mean_k_per_kind(record_of(count_kinds(mask, real, padding_may_hold_anything, NUM_KINDS, (200,))))) == 3


def test_counts_survive_packing_and_add_up():
    mask, real, kinds = example()
    record = record_of(count_kinds(mask, real, kinds, NUM_KINDS, (200,)))
    records = {"a": record, "b": record + record}
    back = unpack(pack(records), records)
    assert mean_k_per_kind(back["a"]) == mean_k_per_kind(back["b"]) == mean_k_per_kind(record)
    assert torch.equal(back["b"].statistics["tokens_per_kind"], 2 * record.statistics["tokens_per_kind"])


def test_fallbacks_count_as_in_the_mean_over_all_tokens():
    """The mask holds what was sent, forced experts included, and so do the counts."""
    mask = torch.tensor([[True, False], [True, True]])
    routing = Routing(mask, mask.float(), {}, unrouted=torch.tensor([True, False]))
    record = RoutingRecords.of(routing, torch.zeros(2, 2), None)
    statistics = count_kinds(mask, None, torch.tensor([0, 0]), 1, (2,))
    assert mean_k_per_kind(record_of(statistics)) == [record.mean_k] == [1.5]


def test_counting_never_looks_at_a_value():
    """Tensors without values raise at whatever would make a forward pass wait for the device."""
    mask, real, kinds = (tensor.to("meta") for tensor in example())
    assert all(value.is_meta for value in count_kinds(mask, real, kinds, NUM_KINDS, (200,)).values())
    routing = Routing(mask, mask.float(), {}, unrouted=mask.any(1))
    counted, still_real = counted_part(routing, real, torch.ones(20, dtype=torch.bool, device="meta"))
    assert counted.mask.is_meta and counted.unrouted.is_meta and still_real.is_meta
    with pytest.raises(RuntimeError):
        kinds.max().item()
