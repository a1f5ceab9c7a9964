import pytest
import torch
import torch.nn.functional as F

from dynmoe_ds.experts import products_by_slot as module
from dynmoe_ds.experts.products_by_slot import multiply, multiply_pairs
from tests.helpers.reference import assert_near

COUNTS = {"uneven": [3, 0, 1, 9], "empty": [0, 0, 0, 0], "one row": [0, 1, 0, 0], "all to the last": [0, 0, 0, 8]}


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("num_spare", [0, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("dtype", "width", "out"),
    [
        (torch.float64, 8, 16),
        (torch.float32, 8, 16),
        (torch.float32, 7, 5),
        (torch.bfloat16, 8, 16),
        (torch.bfloat16, 8, 4),
    ],
)
def test_every_row_meets_the_matrix_of_its_slot(dtype, width, out, counts, num_spare):
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(counts)
    shapes = ((num_rows + num_spare, width), (len(counts), width, out), (num_rows + num_spare, out))
    rows, matrices, left = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    rows[num_rows:] = torch.nan  # rows that are of no slot
    slots = [e for e, count in enumerate(counts) for _ in range(count)]

    got = multiply(rows, matrices, ends(counts))
    assert got.dtype == dtype and got.shape == (num_rows + num_spare, out)
    want = [row.double() @ matrices[e].double() for e, row in zip(slots, rows, strict=False)]
    assert_near(got[:num_rows], torch.stack(want) if want else got[:0].double())
    # A layer gives its parameters as transposed views.
    view = matrices.transpose(1, 2).contiguous().transpose(1, 2)
    assert_near(multiply(rows, view, ends(counts))[:num_rows], got[:num_rows])

    sums = multiply_pairs(left, rows, ends(counts))
    assert sums.dtype == dtype
    expected = torch.zeros(len(counts), out, width, dtype=torch.float64)
    for i, e in enumerate(slots):
        expected[e] += torch.outer(left[i].double(), rows[i].double())
    assert_near(sums, expected)
    assert not sums[torch.tensor(counts) == 0].any()


def test_aligned_sizes_take_grouped_mm_and_others_the_loop(monkeypatch):
    calls = []
    monkeypatch.setattr(module.F, "grouped_mm", lambda *a, _real=F.grouped_mm, **k: calls.append(1) or _real(*a, **k))
    cases = {(torch.float32, 8): 2, (torch.float32, 6): 0, (torch.bfloat16, 12): 0, (torch.float64, 8): 0}
    for (dtype, width), expected in cases.items():
        calls.clear()
        rows = torch.ones(3, width, dtype=dtype)
        multiply(rows, torch.ones(2, width, 16, dtype=dtype), ends([1, 2]))
        multiply_pairs(torch.ones(3, 16, dtype=dtype), rows, ends([1, 2]))
        assert len(calls) == expected, (dtype, width)
