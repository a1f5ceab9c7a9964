import pytest
import torch

from dynmoe_ds.routing import Routing, RoutingRecords
from dynmoe_ds.routing.records import pack, sum_of, unpack
from tests.helpers.no_waiting import NoWaiting
from tests.helpers.reference import assert_near

FIELDS = ("tokens_per_slot", "num_tokens", "num_assignments", "num_unrouted", "unrouted_sum")


def example(dtype: torch.dtype = torch.float32, real: torch.Tensor | None = None) -> RoutingRecords:
    """Five tokens, three slots: two experts, one, nobody (an open gate by fallback only), nobody, one."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    unrouted = torch.tensor([False, False, True, True, False])
    hidden = torch.arange(10.0).view(5, 2).to(dtype)
    return RoutingRecords.of(Routing(mask, mask.float(), {}, unrouted), hidden, real)


def assert_equal(a: RoutingRecords, b: RoutingRecords) -> None:
    for name in FIELDS:
        one, other = getattr(a, name), getattr(b, name)
        assert torch.equal(one, other) and one.dtype == other.dtype, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_worked_example(dtype):
    record = example(dtype)
    assert record.tokens_per_slot.tolist() == [3, 1, 1]
    assert [int(getattr(record, name)) for name in FIELDS[1:4]] == [5, 5, 2]
    assert record.unrouted_sum.tolist() == [4 + 6, 5 + 7] and record.unrouted_sum.dtype == torch.float64
    assert record.mean_k == 1.0 and record.unrouted_share == 0.4


def test_tokens_are_counted_without_padding():
    record = example(real=torch.tensor([True, True, True, True, False]))
    assert int(record.num_tokens) == 4 and record.unrouted_share == 0.5


def test_sums_of_many_16_bit_vectors_keep_their_precision():
    hidden, everybody = torch.ones(4000, 2, dtype=torch.bfloat16), torch.ones(4000, dtype=torch.bool)
    nobody = Routing(~everybody[:, None], torch.zeros(4000, 1), {}, unrouted=everybody)
    assert RoutingRecords.of(nobody, hidden, None).unrouted_sum.tolist() == [4000.0, 4000.0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_tokens", [0, 1, 57])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_summed_alike_where_nothing_may_wait(dtype, num_tokens, share):
    """As on a GPU, and as on a CPU: against a loop; routed tokens that are not finite are in neither."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 5, generator=generator).to(dtype)
    chosen = torch.rand(num_tokens, generator=generator) < share
    hidden[~chosen] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, torch.nan], dtype=dtype)
    with NoWaiting():
        got = sum_of(hidden, chosen, may_wait=False)
    expected = torch.zeros(5, dtype=torch.float64)
    for row, is_chosen in zip(hidden.double(), chosen.tolist(), strict=True):
        expected += row if is_chosen else 0.0
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(got, expected)
    assert_near(sum_of(hidden, chosen, may_wait=True), expected)


def test_records_carry_no_graph():
    hidden = torch.ones(1, 2, requires_grad=True)
    routing = Routing(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1), {}, torch.tensor([True]))
    assert not RoutingRecords.of(routing, hidden, None).unrouted_sum.requires_grad


def test_without_tokens_the_ratios_are_zero():
    none = Routing(torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, 3), {}, torch.zeros(0, dtype=torch.bool))
    record = RoutingRecords.of(none, torch.zeros(0, 2), None)
    assert record.tokens_per_slot.tolist() == [0, 0, 0]
    assert (record.mean_k, record.unrouted_share) == (0.0, 0.0)


def test_records_add_up_in_every_field():
    both = example() + example()
    for name in FIELDS:
        assert torch.equal(getattr(both, name), 2 * getattr(example(), name)), name


def test_packing_and_unpacking():
    big = example() + RoutingRecords(
        tokens_per_slot=torch.tensor([2**52, 0, 1]),
        num_tokens=torch.tensor(2**52),
        num_assignments=torch.tensor(2**52 + 1),
        num_unrouted=torch.tensor(7),
        unrouted_sum=torch.tensor([1 / 3, -2e300], dtype=torch.float64),
    )
    records = {"b": example(), "a": big}
    flat = pack(records)
    assert flat.dtype == torch.float64 and flat.shape == (2 * (3 + 3 + 2),)
    for name, record in unpack(flat, records).items():
        assert_equal(record, records[name])
    for name, record in unpack(flat * 2, records).items():  # as an all-reduce over two ranks would
        if name == "b":
            assert_equal(record, example() + example())
    assert pack({}).numel() == 0 and unpack(pack({}), {}) == {}
