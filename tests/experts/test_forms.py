"""The forms of experts: of all slots at once, and slot by slot."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynmoe_ds.experts.all_slots import GatedOfAllSlots, TwoLayersOfAllSlots
from dynmoe_ds.experts.swiglu_slots import SwigluSlots
from tests.helpers.products import HookedProducts
from tests.helpers.reference import assert_near, expert

D, F, COUNTS = 8, 16, [3, 0, 4, 1]
SHAPES = {
    "swiglu": {"w1": (4, F, D), "w3": (4, F, D), "w2": (4, D, F)},
    "gelu": {"w1": (4, F, D), "b1": (4, F), "w2": (4, D, F), "b2": (4, D)},
}


class CountedProducts(TorchDispatchMode):
    """Counts matrix products, those that C++ asks torch for too."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.in_cpp = HookedProducts()

    def __enter__(self):
        self.in_cpp.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.in_cpp.__exit__(*exception)
        self.number += len(self.in_cpp.threads)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "_grouped_mm")
        return func(*args, **(kwargs or {}))


SLOT_ENDS = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
FORMS = {
    "swiglu": lambda rows, weights, *params: GatedOfAllSlots.apply(rows, weights, SLOT_ENDS, *params, "silu"),
    "swiglu in C++": lambda rows, weights, *params: SwigluSlots.apply(rows, weights, COUNTS, *params),
    "gelu": lambda rows, weights, *params: TwoLayersOfAllSlots.apply(rows, weights, SLOT_ENDS, *params, "gelu"),
}
SHAPES["swiglu in C++"] = SHAPES["swiglu"]


@pytest.fixture(params=FORMS)
def form(request) -> str:
    return request.param


def tensors(form: str, dtype: torch.dtype, num_spare: int = 0) -> dict[str, Tensor]:
    """Rows, their weights in float32 or wider, and parameters; leaves, with NaN in rows that are of no slot."""
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(COUNTS)
    made = {"rows": torch.randn(num_rows + num_spare, D, generator=generator).to(dtype)}
    made["row_weights"] = torch.rand(len(made["rows"]), generator=generator).to(
        torch.promote_types(dtype, torch.float32)
    )
    made |= {name: torch.randn(*shape, generator=generator).to(dtype) / 2 for name, shape in SHAPES[form].items()}
    made["rows"][num_rows:] = torch.nan
    return {name: value.requires_grad_() for name, value in made.items()}


def run(form: str, leaves: dict[str, Tensor]) -> Tensor:
    return FORMS[form](*leaves.values())


@pytest.mark.parametrize("num_spare", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_equal_the_formula(form, dtype, num_spare):
    if form == "swiglu in C++" and dtype == torch.float64:
        pytest.skip("C++ knows no float64")
    leaves = tensors(form, dtype, num_spare)
    num_rows = sum(COUNTS)
    out = run(form, leaves)
    assert out.dtype == dtype
    grad = torch.randn(len(out), D, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad[num_rows:] = torch.nan
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)

    wide = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    p = {f"experts.{name}": value for name, value in wide.items()}
    slots = [e for e, count in enumerate(COUNTS) for _ in range(count)]
    want = torch.stack([wide["row_weights"][i] * expert(p, e, wide["rows"][i]) for i, e in enumerate(slots)])
    expected = torch.autograd.grad(want, list(wide.values()), grad[:num_rows].double())
    assert_near(out[:num_rows], want.detach())
    for name, got, exact in zip(leaves, gradients, expected, strict=True):
        of_rows = name in ("rows", "row_weights")
        end = num_rows if of_rows else len(got)
        assert got.dtype == leaves[name].dtype
        assert_near(got[:end], exact[:end], dtype, what=name)
        if not of_rows:
            assert not got[1].any(), "the slot without rows"


@pytest.mark.parametrize("make_grad", [lambda g: g.T.contiguous().T, lambda g: g[:1].expand_as(g)], ids=["T", "expand"])
def test_gradients_of_any_layout(form, make_grad):
    leaves = tensors(form, torch.float32)
    grad = make_grad(torch.randn(sum(COUNTS), D))
    assert not grad.is_contiguous()
    out = run(form, leaves)
    got = torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)
    want = torch.autograd.grad(out, list(leaves.values()), grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_frozen_parameters_get_no_gradient_and_the_others_theirs(form):
    for frozen in SHAPES[form]:
        leaves = tensors(form, torch.float32)
        with CountedProducts() as counted:
            whole = torch.autograd.grad(run(form, leaves).square().sum(), list(leaves.values()))
        of_all = counted.number
        leaves[frozen].requires_grad_(False)
        with CountedProducts() as counted:
            run(form, leaves).square().sum().backward()
        assert (counted.number < of_all) == frozen.startswith("w"), "the product for nobody is left out"
        assert leaves[frozen].grad is None
        for (name, leaf), want in zip(leaves.items(), whole, strict=True):
            assert name == frozen or torch.equal(leaf.grad, want), (frozen, name)


def test_only_parameters_inputs_and_products_are_saved(form):
    """Under ZeRO-3 a saved view would keep the gathered weight alive; an activation more would cost memory."""
    leaves = tensors(form, torch.float32)
    saved = run(form, leaves).grad_fn.saved_tensors
    own = [tensor for tensor in saved if any(tensor is leaf for leaf in leaves.values())]
    others = [tensor.shape for tensor in saved if not any(tensor is leaf for leaf in leaves.values())]
    assert len(own) == len(leaves)
    gate_up_pre = [(sum(COUNTS), F)] * (1 if form == "gelu" else 2)
    slot_ends = [] if form == "swiglu in C++" else [(len(COUNTS),)]
    assert sorted(map(tuple, others)) == sorted([*slot_ends, *gate_up_pre])
