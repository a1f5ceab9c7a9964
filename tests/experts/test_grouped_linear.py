import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from dynmoe_ds.experts import grouped_linear as module
from dynmoe_ds.experts.grouped_linear import grouped_linear
from tests.helpers.reference import assert_near

COUNTS = {"uneven": [3, 0, 1, 9], "empty": [0, 0, 0, 0], "one row": [0, 1, 0, 0], "all to the last": [0, 0, 0, 8]}


def inputs(counts, dtype, width=8, out=16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(counts), width), (len(counts), out, width), (sum(counts), out))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


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
def test_every_row_goes_through_its_expert(dtype, width, out, counts):
    rows, weight, grad = inputs(counts, dtype, width, out)
    got = grouped_linear(rows, weight, torch.tensor(counts))
    got_grads = torch.autograd.grad(got, (rows, weight), grad)

    wide_rows, wide_weight = (t.detach().double().requires_grad_() for t in (rows, weight))
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    want = [wide_weight[e] @ row for e, row in zip(experts, wide_rows, strict=True)]
    want = torch.stack(want) if want else (wide_rows @ wide_weight[0].T)
    want_grads = torch.autograd.grad(want, (wide_rows, wide_weight), grad.double())
    for a, b, what in zip((got, *got_grads), (want, *want_grads), ("output", "rows", "weight"), strict=True):
        assert a.dtype == dtype
        assert_near(a, b, what=what)
    idle = torch.tensor(counts) == 0
    assert not got_grads[1][idle].any()


@pytest.mark.parametrize("make_grad", [lambda g: g.T.contiguous().T, lambda g: g[:1].expand_as(g)], ids=["T", "expand"])
def test_gradients_of_any_layout(make_grad):
    counts = [3, 0, 1, 9]
    rows, weight, grad = inputs(counts, torch.float32)
    grad = make_grad(grad.detach())
    assert not grad.is_contiguous()
    out = grouped_linear(rows, weight, torch.tensor(counts))
    got = torch.autograd.grad(out, (rows, weight), grad, retain_graph=True)
    want = torch.autograd.grad(out, (rows, weight), grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["grouped_mm", "loop"])
def test_frozen_inputs_get_no_gradient(dtype):
    rows, weight, _ = inputs([2, 1], dtype)
    out = grouped_linear(rows.detach(), weight, torch.tensor([2, 1])).sum()
    out.backward()
    assert weight.grad is not None
    grouped_linear(rows, weight.detach(), torch.tensor([2, 1])).sum().backward()
    assert rows.grad is not None


def test_the_saved_weight_is_the_parameter_itself():
    # Under ZeRO-3 a saved view would keep the gathered weight alive.
    rows, weight, _ = inputs([2, 1], torch.float32)
    out = grouped_linear(rows, weight, torch.tensor([2, 1]))
    assert any(saved is weight for saved in out.grad_fn.saved_tensors)


def test_aligned_sizes_take_grouped_mm_and_others_the_loop(monkeypatch):
    calls = []
    monkeypatch.setattr(module.F, "grouped_mm", lambda *a, _real=F.grouped_mm, **k: calls.append(1) or _real(*a, **k))
    cases = {(torch.float32, 8): 1, (torch.float32, 6): 0, (torch.bfloat16, 12): 0, (torch.float64, 8): 0}
    for (dtype, width), expected in cases.items():
        calls.clear()
        rows, weight, _ = inputs([1, 2], dtype, width)
        grouped_linear(rows, weight, torch.tensor([1, 2]))
        assert len(calls) == expected, (dtype, width)


def test_gradient_by_finite_differences():
    rows, weight, _ = inputs([2, 0, 1], torch.float64, 3, 2)
    assert gradcheck(lambda r, w: grouped_linear(r, w, torch.tensor([2, 0, 1])), (rows, weight))
