"""What every operation must give, on any device and whoever computes it.

A case calls an operation as it is chosen (`forced_kernels`) and compares it with its twin and with something
independent of both: a loop, or autograd in float64. The same cases run on the twins, on the kernels in Triton's
interpreter, and on the kernels on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dynmoe_kernels as kernels
from dynmoe_kernels.gather_rows import gather_rows_torch
from dynmoe_kernels.plan import PlanIndices, plan_torch
from dynmoe_kernels.products_by_slot import multiply_by_slot_torch, multiply_pairs_by_slot_torch
from dynmoe_kernels.sum_rows import sum_rows_torch
from dynmoe_kernels.sum_slots import sum_slots_torch
from dynmoe_kernels.top_any_gates import cosine_scores_backward_torch, top_any_gates_torch
from dynmoe_kernels.weighted_activation import weighted_activation_backward_torch, weighted_activation_torch
from dynmoe_kernels.weighted_bias import add_weighted_bias_backward_torch, add_weighted_bias_torch
from dynmoe_kernels.weighted_gated import weighted_gated_backward_torch, weighted_gated_torch
from tests.helpers.reference import ACTIVATIONS

LAST_PLACE = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""A unit in the last place, relative: what one rounding may cost. Triton's interpreter truncates bfloat16."""

COMPUTED_IN = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
"""Relative to the greatest element (at least 1): what computing in float64 or, for all else, in float32 may cost."""


def assert_rounded_once(got: Tensor, expected: Tensor, what: str) -> None:
    """Every element of `got` is within one rounding to its dtype of `expected`, computed at least in float32."""
    assert got.shape == expected.shape, (what, got.shape, expected.shape)
    if got.numel():
        got, wanted, dtype = got.cpu().double(), expected.cpu().double(), got.dtype
        limit = LAST_PLACE[dtype] * wanted.abs() + COMPUTED_IN[dtype] * wanted.abs().max().clamp_min(1)
        error = (got - wanted).abs()
        assert (error <= limit).all(), f"{what} is off by {error.max()}, {(error / limit).max()} times the limit"


def assert_like(got: Sequence[Tensor | None], expected: Sequence[Tensor | None], what: str) -> None:
    """`assert_rounded_once` for each, None only where None is expected, and the dtypes of `expected`."""
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert (one is None) == (other is None), (what, index)
        if one is not None and other is not None:
            assert one.dtype == other.dtype and one.device == other.device, (what, index, one.dtype, other.dtype)
            assert_rounded_once(one, other, f"{what}[{index}]")


def random_mask(num_tokens: int, num_slots: int, share: float) -> Tensor:
    """[T, S] bool with about `share` of the pairs, the same every time; without token 2 and slot 1, if it can be."""
    mask = torch.rand(num_tokens, num_slots, generator=torch.Generator().manual_seed(num_tokens)) < share
    if share < 1:
        mask[2:3] = False
        mask[:, 1:2] = False
    return mask


class Draw:
    """Tensors of the normal distribution on a device, the same every time, with or without contiguous rows."""

    def __init__(self, device: str, dtype: torch.dtype, *, is_transposed: bool = False) -> None:
        self.device, self.dtype, self.is_transposed = device, dtype, is_transposed
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self.generator)
        if self.is_transposed and len(shape) == 2:
            values = values.T.contiguous().T
        return values.to(self.device, self.dtype)

    def weights(self, *shape: int) -> Tensor:
        """Combine weights, in float32 or wider."""
        values = torch.rand(*shape, generator=self.generator)
        return values.to(self.device, torch.promote_types(self.dtype, torch.float32))


def slot_ends(rows_per_slot: Sequence[int], device: str) -> Tensor:
    return torch.tensor(rows_per_slot, device=device).cumsum(0, dtype=torch.int32)


def slots_of(rows_per_slot: Sequence[int], num_rows: int) -> list[int]:
    """The slot of every row, by hand; the last slot for rows after all slots' own."""
    slots = [slot for slot, count in enumerate(rows_per_slot) for _ in range(count)]
    return slots + [len(rows_per_slot) - 1] * (num_rows - len(slots))


# The plan ------------------------------------------------------------------------------------------------------------


def plan_by_hand(mask: Tensor, num_rows: int | None) -> dict[str, list[int]]:
    """The fields of the plan from a loop over slots and one over tokens."""
    num_tokens, num_slots = mask.shape
    held = mask.tolist()
    rows = [(token, slot) for slot in range(num_slots) for token in range(num_tokens) if held[token][slot]]
    entries = sorted(rows)
    spare = [] if num_rows is None else list(range(len(rows), num_rows))
    return {
        "token_index": [token for token, _ in rows] + [0 for _ in spare],
        "pair_index": [token * num_slots + slot for token, slot in rows] + [0 for _ in spare],
        "rows_per_slot": [sum(slot == other for _, other in rows) for slot in range(num_slots)],
        "row_index": [rows.index(entry) for entry in entries] + spare,
        "entry_index": [entries.index(row) for row in rows] + spare,
        "first_row": [sum(other < token for other, _ in rows) for token in range(num_tokens + 1)],
    }


def check_plan(device: str, mask: Tensor, spare: int | None) -> None:
    num_rows = None if spare is None else int(mask.sum()) + spare
    got = kernels.plan(mask.to(device), num_rows)
    for name, expected in plan_by_hand(mask, num_rows).items():
        for who, plan in (("plan", got), ("twin", plan_torch(mask, num_rows))):
            field_of_plan = getattr(plan, name)
            assert field_of_plan.dtype == torch.int64, (who, name)
            assert field_of_plan.tolist() == expected, (who, name)


def check_transposed_mask(device: str) -> None:
    mask = random_mask(11, 6, 0.4)
    got = kernels.plan(mask.T.contiguous().to(device).T, None)
    assert got.row_index.tolist() == plan_by_hand(mask, None)["row_index"]


def check_plan_with_too_few_rows(device: str) -> None:
    mask = random_mask(13, 5, 0.5)
    for num_rows in (0, 1, int(mask.sum()) - 3):
        for got in (kernels.plan(mask.to(device), num_rows), plan_torch(mask, num_rows)):
            assert got.rows_per_slot.tolist() == mask.sum(0).tolist()
            for index in (got.token_index, got.row_index, got.entry_index, got.pair_index):
                assert len(index) == num_rows
            if num_rows:
                assert 0 <= got.token_index.min() <= got.token_index.max() < 13
                assert 0 <= got.pair_index.min() <= got.pair_index.max() < 13 * 5
                assert 0 <= got.row_index.min() <= got.row_index.max() < num_rows
                assert 0 <= got.entry_index.min() <= got.entry_index.max() < num_rows
            assert 0 <= got.first_row.min() <= got.first_row.max() <= num_rows


# Rows and their sums -------------------------------------------------------------------------------------------------


def plan_on(device: str, mask: Tensor, spare: int) -> PlanIndices:
    """The twin's plan, so that these cases do not depend on the plan's kernel."""
    plan = plan_torch(mask, int(mask.sum()) + spare)
    return PlanIndices(**{name: getattr(plan, name).to(device) for name in plan.__dataclass_fields__})


def check_gather(device: str, dtype: torch.dtype, mask: Tensor, width: int, spare: int, is_transposed: bool) -> None:
    plan, num_pairs = plan_on(device, mask, spare), int(mask.sum())
    hidden = Draw(device, dtype, is_transposed=is_transposed)(len(mask), width)
    arguments = (hidden, plan.token_index, plan.row_index, plan.first_row)
    got = kernels.gather_rows(*arguments)
    assert got.shape == (num_pairs + spare, width) and got.dtype == dtype
    pairs = [(token, slot) for slot in range(mask.shape[1]) for token in range(len(mask)) if mask[token, slot]]
    expected = torch.stack([hidden[token] for token, _ in pairs]) if pairs else hidden[:0]
    assert torch.equal(got[:num_pairs], expected)
    assert torch.equal(got[:num_pairs], gather_rows_torch(*arguments)[:num_pairs])


def check_sum(device: str, dtype: torch.dtype, mask: Tensor, width: int, spare: int, is_transposed: bool) -> None:
    plan, num_pairs = plan_on(device, mask, spare), int(mask.sum())
    rows = Draw(device, dtype, is_transposed=is_transposed)(num_pairs + spare, width)
    rows[num_pairs:] = torch.nan  # rows of no token must not reach any sum
    arguments = (rows, plan.row_index, plan.first_row)
    got = kernels.sum_rows(*arguments)
    expected = torch.zeros(len(mask), width, dtype=torch.float64)
    for row, token in zip(rows.cpu().double(), plan.token_index[:num_pairs].tolist(), strict=False):
        expected[token] += row
    assert_rounded_once(got, expected, "sum_rows")
    assert_like([got], [sum_rows_torch(*arguments)], "sum_rows and its twin")
    assert torch.equal(got, kernels.sum_rows(*arguments)), "the same bits every time"


def check_sum_of_many_ones(device: str, dtype: torch.dtype) -> None:
    """A sum kept in bfloat16 would stay at 256."""
    plan = plan_on(device, torch.ones(3, 300, dtype=torch.bool), 0)
    rows = torch.ones(900, 5, dtype=dtype, device=device)
    assert torch.equal(kernels.sum_rows(rows, plan.row_index, plan.first_row).cpu(), torch.full((3, 5), 300).to(dtype))


def check_rows_beyond_32_bits(device: str) -> None:
    """The last row begins after 2^31 elements. Of the 4.3 GB hardly a page is touched on a CPU."""
    width, num_rows = 1024, 2**21 + 1
    indices = {"row_index": torch.full((num_rows,), num_rows - 1), "first_row": torch.tensor([0, 1])}
    indices = {name: index.to(device) for name, index in indices.items()}
    hidden = Draw(device, torch.bfloat16)(1, width)
    rows = kernels.gather_rows(hidden, torch.zeros_like(indices["row_index"]), **indices)
    assert torch.equal(rows[-1:], hidden)
    assert torch.equal(kernels.sum_rows(rows, **indices), hidden)


# Activations with a weight per row -----------------------------------------------------------------------------------


def by_autograd(formula: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """`formula(*inputs)` and the gradients of the inputs for that of the result, in float64 on the CPU."""
    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    out = formula(*wide)
    return [out.detach(), *torch.autograd.grad(out, wide, grad.cpu().double())]


def check_gated(
    device: str, dtype: torch.dtype, activation: kernels.Activation, num_rows: int, width: int, is_transposed: bool
) -> None:
    draw = Draw(device, dtype, is_transposed=is_transposed)
    gate, up, grad = 3 * draw(num_rows, width), draw(num_rows, width), draw(num_rows, width)
    weights = draw.weights(num_rows)
    product, grad_gate, grad_up, grad_weights = by_autograd(
        lambda a, b, w: ACTIVATIONS[activation](a) * b * w[:, None], grad, gate, up, weights
    )
    got = kernels.weighted_gated(gate, up, weights, activation)
    assert_rounded_once(got, product, "weighted_gated")
    assert_like([got], [weighted_gated_torch(gate, up, weights, activation)], "weighted_gated and its twin")
    for with_product in (True, False):
        arguments: tuple[Any, ...] = (grad, gate, up, weights, activation)
        backward = kernels.weighted_gated_backward(*arguments, with_product=with_product)
        expected = {"grad_gate": grad_gate, "grad_up": grad_up, "grad_weights": grad_weights, "product": product}
        for one, (name, other) in zip(backward, expected.items(), strict=True):
            if one is not None:
                assert_rounded_once(one, other, name)
        twin = weighted_gated_backward_torch(*arguments, with_product=with_product)
        assert_like(backward, twin, "weighted_gated_backward and its twin")
        assert (backward[3] is not None) == with_product


def check_activation(
    device: str,
    dtype: torch.dtype,
    activation: kernels.Activation,
    rows_per_slot: Sequence[int],
    spare: int,
    width: int,
    is_transposed: bool,
) -> None:
    num_rows = sum(rows_per_slot) + spare
    draw = Draw(device, dtype, is_transposed=is_transposed)
    pre, bias, grad = 2 * draw(num_rows, width), draw(len(rows_per_slot), width), draw(num_rows, width)
    weights, ends = draw.weights(num_rows), slot_ends(rows_per_slot, device)
    slots = slots_of(rows_per_slot, num_rows)

    def formula(pre: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        return ACTIVATIONS[activation](pre + bias[slots]) * weights[:, None]

    product, grad_pre, grad_bias, grad_weights = by_autograd(formula, grad, pre, bias, weights)
    got = kernels.weighted_activation(pre, bias, weights, ends, activation)
    assert_rounded_once(got, product, "weighted_activation")
    twin = weighted_activation_torch(pre, bias, weights, ends, activation)
    assert_like([got], [twin], "weighted_activation and its twin")
    for with_product in (True, False):
        arguments: tuple[Any, ...] = (grad, pre, bias, weights, ends, activation)
        backward = kernels.weighted_activation_backward(*arguments, with_product=with_product)
        assert_rounded_once(backward[0], grad_pre, "grad_pre")
        assert_rounded_once(backward[1], grad_weights, "grad_weights")
        if backward[2] is not None:
            assert_rounded_once(backward[2], product, "product")
        twin = weighted_activation_backward_torch(*arguments, with_product=with_product)
        assert_like(backward, twin, "weighted_activation_backward and its twin")
        assert (backward[2] is not None) == with_product
    if not spare and dtype in (torch.float32, torch.float64):
        assert_rounded_once(kernels.sum_slots(backward[0], ends), grad_bias, "grad_bias")


def check_sum_slots(
    device: str, dtype: torch.dtype, rows_per_slot: Sequence[int], spare: int, width: int, is_transposed: bool
) -> None:
    num_rows, ends = sum(rows_per_slot) + spare, slot_ends(rows_per_slot, device)
    rows = Draw(device, dtype, is_transposed=is_transposed)(num_rows, width)
    rows[num_rows - spare :] = torch.nan  # rows of no slot must not reach any sum
    expected = torch.zeros(len(rows_per_slot), width, dtype=torch.float64)
    for row, slot in enumerate(slots_of(rows_per_slot, num_rows - spare)):
        expected[slot] += rows[row].cpu().double()
    got = kernels.sum_slots(rows, ends)
    assert_rounded_once(got, expected, "sum_slots")
    assert_like([got], [sum_slots_torch(rows, ends)], "sum_slots and its twin")


def check_weighted_bias(
    device: str, dtype: torch.dtype, rows_per_slot: Sequence[int], spare: int, width: int, is_transposed: bool
) -> None:
    num_rows, ends = sum(rows_per_slot) + spare, slot_ends(rows_per_slot, device)
    draw = Draw(device, dtype, is_transposed=is_transposed)
    rows, bias, grad = draw(num_rows, width), draw(len(rows_per_slot), width), draw(num_rows, width)
    weights, slots = draw.weights(num_rows), slots_of(rows_per_slot, num_rows)
    grad[num_rows - spare :] = 0.0  # nothing reads these rows of the sum
    sums, _, grad_bias, grad_weights = by_autograd(
        lambda rows, bias, weights: rows + bias[slots] * weights[:, None], grad, rows, bias, weights
    )
    got = kernels.add_weighted_bias(rows, bias, weights, ends)
    assert_rounded_once(got, sums, "add_weighted_bias")
    assert_like([got], [add_weighted_bias_torch(rows, bias, weights, ends)], "add_weighted_bias and its twin")
    backward = kernels.add_weighted_bias_backward(grad, bias, weights, ends)
    assert_rounded_once(backward[0], grad_bias, "grad_bias")
    assert_rounded_once(backward[1], grad_weights, "grad_weights")
    twin = add_weighted_bias_backward_torch(grad, bias, weights, ends)
    assert_like(backward, twin, "add_weighted_bias_backward and its twin")


# Products with one matrix per slot ------------------------------------------------------------------------------------


def check_products(
    device: str,
    dtype: torch.dtype,
    rows_per_slot: Sequence[int],
    spare: int,
    width: int,
    out: int,
    is_transposed: bool,
) -> None:
    """A linear map per slot, forwards and backwards; a layer gives its parameters as transposed views."""
    num_rows, num_slots, ends = sum(rows_per_slot), len(rows_per_slot), slot_ends(rows_per_slot, device)
    draw = Draw(device, dtype, is_transposed=is_transposed)
    rows, grad = draw(num_rows + spare, width), draw(num_rows + spare, out)
    matrices = draw(num_slots, width, out) / max(width, 1) ** 0.5
    transposed = matrices.transpose(1, 2).contiguous().transpose(1, 2)
    rows[num_rows:] = grad[num_rows:] = torch.nan  # rows of no slot
    slots = slots_of(rows_per_slot, num_rows)

    def formula(rows: Tensor, matrices: Tensor) -> Tensor:
        found = [row @ matrices[slot] for row, slot in zip(rows, slots, strict=True)]
        return torch.stack(found) if found else rows @ matrices[0]

    products, grad_rows, grad_matrices = by_autograd(formula, grad[:num_rows], rows[:num_rows], matrices)
    of_rows = {
        "products": (kernels.multiply_by_slot, multiply_by_slot_torch, (rows, transposed), products),
        "grad_rows": (kernels.multiply_by_slot, multiply_by_slot_torch, (grad, transposed.transpose(1, 2)), grad_rows),
    }
    for name, (operation, twin, operands, expected) in of_rows.items():
        got = operation(*operands, ends)
        assert got.shape == (num_rows + spare, expected.shape[1]) and got.dtype == dtype, name
        assert_rounded_once(got[:num_rows], expected, name)
        assert_like([got[:num_rows]], [twin(*operands, ends)[:num_rows]], f"{name} and its twin")
    assert_rounded_once(kernels.multiply_by_slot(rows, matrices, ends)[:num_rows], products, "products, by rows")
    got = kernels.multiply_pairs_by_slot(rows, grad, ends)
    if device != "cpu":  # in the interpreter a program has no other beside it, and costs a tenth of a second
        assert torch.equal(got, kernels.multiply_pairs_by_slot(rows, grad, ends)), "the same bits every time"
    assert_rounded_once(got, grad_matrices, "grad_matrices")
    assert_like([got], [multiply_pairs_by_slot_torch(rows, grad, ends)], "grad_matrices and their twin")
    assert not got[torch.tensor(rows_per_slot) == 0].any()


# Gates ---------------------------------------------------------------------------------------------------------------


def check_gates(
    device: str, dtype: torch.dtype, num_tokens: int, width: int, num_slots: int, is_transposed: bool
) -> None:
    draw = Draw(device, dtype, is_transposed=is_transposed)
    wide = torch.promote_types(dtype, torch.float32)
    hidden = draw(num_tokens, width)
    hidden[1:2] = 0.0  # a zero vector
    hidden[3:4] *= 1e-3
    unit_rows = torch.nn.functional.normalize(draw(num_slots, width).to(wide), dim=1)
    unit_rows[2:3] = 0.0  # the row of a free slot
    threshold = 0.2 * draw(num_slots).to(wide)
    threshold[0] = 0.0
    active = torch.arange(num_slots, device=device) != 2
    grad = draw(num_tokens, num_slots).to(wide)

    x, rows = (t.detach().cpu().double().requires_grad_() for t in (hidden, unit_rows))
    length = torch.sqrt((x * x).sum(1))
    is_zero = length == 0
    cosines = (x @ rows.T) / torch.where(is_zero, torch.inf, length)[:, None]
    grad_hidden, grad_rows = torch.autograd.grad(cosines, (x, rows), grad.cpu().double())
    grad_hidden = grad_hidden.masked_fill(is_zero[:, None], 0.0)

    arguments = (hidden, unit_rows, threshold, active)
    scores, lengths, is_open = kernels.top_any_gates(*arguments)
    assert_rounded_once(scores, cosines.detach(), "scores")
    assert lengths[is_zero.to(device)].isinf().all()
    assert_rounded_once(lengths[~is_zero.to(device)], length[~is_zero].detach(), "lengths")
    expected = (cosines > threshold.cpu()) & active.cpu()
    is_clear = (cosines - threshold.cpu()).abs() > 1e-4
    assert is_open.dtype == torch.bool
    assert is_clear.sum() >= 0.9 * is_clear.numel()
    assert torch.equal(is_open.cpu()[is_clear], expected[is_clear])
    assert not is_open[is_zero.to(device), 0].any(), "a score at its threshold is not above it"
    twin = top_any_gates_torch(*arguments)
    assert_rounded_once(scores, twin[0], "scores and their twin")
    assert torch.equal(is_open.cpu()[is_clear], twin[2].cpu()[is_clear])

    arguments = (grad, hidden, unit_rows, lengths, scores)
    backward = kernels.cosine_scores_backward(*arguments)
    assert_rounded_once(backward[0], grad_hidden, "grad_hidden")
    assert_rounded_once(backward[1], grad_rows, "grad_rows")
    assert_like(backward, cosine_scores_backward_torch(*arguments), "cosine_scores_backward and its twin")


# All of them ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call of a check; `dtype` is None where the operation knows one kind of number only."""

    check: Callable[..., None]
    dtype: torch.dtype | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = [str(self.dtype).removeprefix("torch.")] if self.dtype else []
        for name, value in self.arguments.items():
            is_mask = isinstance(value, Tensor)
            is_long = isinstance(value, list) and len(value) > 4
            value = f"{tuple(value.shape)},rows={int(value.sum())}" if is_mask else value
            values.append(f"{name}={len(value)}long" if is_long else f"{name}={value}")
        return f"{self.check.__name__.removeprefix('check_')}({', '.join(values)})"

    def run(self, device: str) -> None:
        dtype = {} if self.dtype is None else {"dtype": self.dtype}
        self.check(device, **dtype, **self.arguments)


# Tokens, slots and the share of pairs: no token, no slot, one of each, odd numbers, several blocks, all, none, many.
MASKS = [
    random_mask(*sizes)
    for sizes in ((0, 5, 0.5), (4, 0, 0.5), (1, 1, 1.0), (13, 5, 0.4), (4, 40, 1.0), (6, 4, 0.0), (15, 301, 0.05))
]
TALL_MASK = random_mask(1100, 2, 0.5)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def all_cases(dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Every case, those of numbers for each of `dtypes`."""
    for mask in MASKS:
        for spare in (None, 0, 3):
            yield Case(check=check_plan, arguments={"mask": mask, "spare": spare})
    yield Case(check=check_plan, arguments={"mask": MASKS[3], "spare": 2500})
    yield Case(check=check_plan, arguments={"mask": TALL_MASK, "spare": None})
    yield Case(check=check_transposed_mask)
    yield Case(check=check_plan_with_too_few_rows)
    for dtype in dtypes:
        yield from _cases_of(dtype)


def _cases_of(dtype: torch.dtype) -> Iterator[Case]:
    def case(check: Callable[..., None], **arguments: Any) -> Case:
        return Case(check=check, dtype=dtype, arguments=arguments)

    for check in (check_gather, check_sum):
        for mask in MASKS if dtype != torch.float16 else ():
            yield case(check, mask=mask, width=33, spare=0, is_transposed=False)
        for width, spare, is_transposed in ((1, 0, False), (64, 5, True), (2100, 0, False)):
            yield case(check, mask=MASKS[3], width=width, spare=spare, is_transposed=is_transposed)
    yield case(check_sum_of_many_ones)
    for num_rows, width, is_transposed in ((0, 8, False), (1, 1, False), (7, 33, True), (3, 2100, False)):
        sizes = {"num_rows": num_rows, "width": width, "is_transposed": is_transposed}
        yield case(check_gated, activation="silu", **sizes)
    for activation in kernels.ACTIVATIONS:
        yield case(check_gated, activation=activation, num_rows=6, width=20, is_transposed=False)
        sizes = {"rows_per_slot": [3, 0, 2], "spare": 0, "width": 20, "is_transposed": False}
        yield case(check_activation, activation=activation, **sizes)
    for check, more in ((check_activation, {"activation": "gelu"}), (check_sum_slots, {}), (check_weighted_bias, {})):
        for rows_per_slot, spare, width, is_transposed in (
            ([0, 0], 0, 8, False),
            ([5], 0, 1, False),
            ([3, 0, 5], 0, 33, True),
            ([0, 4, 2], 3, 64, False),
            ([2, 1], 0, 2100, False),
            ([0] * 20 + [2] + [0] * 12, 0, 5, False),
            ([34, 2], 0, 3, False),
        ):
            sizes = {"spare": spare, "width": width, "is_transposed": is_transposed}
            yield case(check, **more, rows_per_slot=rows_per_slot, **sizes)
    sizes_of_products: list[tuple[Sequence[int], int, int, int, bool]] = [
        ([3, 0, 5], 0, 33, 20, True),
        ([130, 0, 70], 7, 72, 136, False),
    ]
    if dtype != torch.float16:
        sizes_of_products += [([0, 0], 0, 8, 16, False), ([5], 0, 1, 1, False), ([0, 4, 2], 3, 64, 72, False)]
    if dtype == torch.float32:  # more tiles than go together; one slot with all rows; more slots than a warp has lanes
        sizes_of_products += [([5] * 9, 0, 8, 72, False), ([0, 150, 0], 0, 8, 8, False)]
        sizes_of_products += [([0] * 20 + [2] + [0] * 12, 0, 8, 24, False)]
    for rows_per_slot, spare, width, out, is_transposed in sizes_of_products:
        sizes = {"spare": spare, "width": width, "out": out, "is_transposed": is_transposed}
        yield case(check_products, rows_per_slot=rows_per_slot, **sizes)
    for num_tokens, width, num_slots, is_transposed in (
        (0, 8, 3, False),
        (1, 16, 1, False),
        (5, 33, 3, True),
        (70, 64, 17, False),
        (9, 20, 300, False),
        (1100, 16, 4, False),
    ):
        arguments = {"num_tokens": num_tokens, "width": width, "num_slots": num_slots}
        yield case(check_gates, **arguments, is_transposed=is_transposed)


LAYERS = [("swiglu", False), ("swiglu", True), ("gelu", False), ("gelu", True)]
"""Whole layers: the kind of the experts, and whether shapes are static."""


def kernel_cases() -> list[Case]:
    """The cases of the kernels: the dtypes that they know, and what would take their twins too much memory."""
    return [*all_cases(FLOATS), Case(check=check_rows_beyond_32_bits)]
