import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.experts import EXPERT_KINDS, build_experts, few_slots, gated, seeded_generator
from dynmoe_ds.experts.all_slots import GatedOfAllSlots
from dynmoe_ds.experts.swiglu_slots import SwigluSlots
from dynmoe_kernels import forced_kernels
from tests.helpers.reference import assert_near, expert

KINDS = tuple(EXPERT_KINDS)


def make(kind: str, dtype=torch.float64, slots: int = 4, hidden: int = 6, ffn: int = 5):
    experts = build_experts(kind, slots, hidden, ffn).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in experts.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return experts


def rows_of(experts, counts, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(counts), experts.hidden_size, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(sum(counts), generator=generator).to(torch.promote_types(dtype, torch.float32))
    return rows, weights.requires_grad_(), torch.tensor(counts)


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 0, 0], [0, 0, 1, 0]], ids=str)
@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.float64, (6, 5)), (torch.float32, (8, 4)), (torch.bfloat16, (8, 16))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_outputs_equal_the_formula(kind, dtype, sizes, counts):
    experts = make(kind, dtype, 4, *sizes)
    rows, weights, per_slot = rows_of(experts, counts, dtype)
    got = experts(rows, weights, per_slot)
    assert got.dtype == dtype
    slots = [e for e, count in enumerate(counts) for _ in range(count)]
    p = {f"experts.{name}": param.detach().double() for name, param in experts.named_parameters()}
    want = [w * expert(p, e, row, kind) for e, row, w in zip(slots, rows.double(), weights.double(), strict=True)]
    assert_near(got, torch.stack(want) if want else got.double())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    experts = make(kind, slots=3, hidden=3, ffn=2)
    rows, weights, per_slot = rows_of(experts, [2, 0, 1])
    names = [name for name, _ in experts.named_parameters()]

    def call(rows, weights, *params):
        return torch.func.functional_call(experts, dict(zip(names, params, strict=True)), (rows, weights, per_slot))

    assert gradcheck(call, (rows, weights, *(p.detach().requires_grad_() for p in experts.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_in_cpp_equals_swiglu_of_all_slots(dtype):
    """With a slot without rows."""
    per_slot = torch.tensor([20, 0, 13])
    shapes = [(33, 16), (33,), (3, 24, 16), (3, 24, 16), (3, 16, 24)]
    tensors = [torch.randn(*shape, generator=torch.Generator().manual_seed(i)) / 2 for i, shape in enumerate(shapes)]
    tensors = [t if t.dim() == 1 else t.to(dtype) for t in tensors]  # weights of rows stay in float32

    def run(function, counts):
        rows, weights, *params = (t.clone().requires_grad_() for t in tensors)
        out = function(rows, weights, counts, *params)
        return [out, *torch.autograd.grad(out.square().sum(), [rows, weights, *params])]

    by_slot = run(SwigluSlots.apply, per_slot.tolist())
    grouped = run(lambda *args: GatedOfAllSlots.apply(*args, "silu"), per_slot.cumsum(0, dtype=torch.int32))
    for got, expected in zip(by_slot, grouped, strict=True):
        assert_near(got, expected.detach(), dtype)
    assert not any(gradient[1].any() for gradient in by_slot[3:]), "the slot without rows"


def test_a_second_backward_pass_through_swiglu_gives_the_same():
    """The buffers that the backward pass overwrites are its own."""
    experts = make("swiglu", torch.float32)
    rows, weights, per_slot = rows_of(experts, [3, 0, 4, 1], torch.float32)
    out, inputs = experts(rows, weights, per_slot), [rows, weights, *experts.parameters()]
    first = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    second = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operations make inside the block."""

    def __enter__(self):
        self.storages = {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # kept alive: no id twice
        return out

    @property
    def num_bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())

    @property
    def most_bytes(self):
        return max(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_inference_makes_hidden_units_of_few_slots_at_once(kind, mode, dtype, spare, monkeypatch):
    """An activation of all slots is never made; here none of more rows than the largest slot has."""
    counts, ffn, hidden = [5, 3, 64, 0, *[40] * 13, 0], 512, 8
    experts = make(kind, dtype, len(counts), hidden, ffn)
    monkeypatch.setattr(few_slots, "_ACTIVATION_BYTES", max(counts) * ffn * dtype.itemsize)
    rows, weights, _ = rows_of(experts, [*counts, spare], dtype)
    per_slot = torch.tensor(counts)
    expected = experts(rows, weights, per_slot)
    with mode(), forced_kernels("torch"), Allocations() as made:
        got = experts(rows, weights, per_slot)
    assert_near(got[: sum(counts)], expected[: sum(counts)].detach(), dtype)
    assert made.most_bytes <= max(counts) * ffn * 4  # the float32 of 16-bit numbers
    assert made.most_bytes < sum(counts) * ffn * dtype.itemsize


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ([3, 2, 5, 1], [[3, 2], [5], [1]]),
        ([0, 9, 0, 1], [[0, 9], [0, 1]]),
        ([0, 0, 2, 0, 0, 4, 0], [[0, 0, 2, 0, 0], [4, 0]]),
        ([1, 1, 1], [[1, 1, 1]]),
        ([0, 0], []),
        ([7], [[7]]),
    ],
    ids=str,
)
def test_slots_are_computed_together_while_they_are_small(counts, parts):
    assert [counts[part] for part in few_slots._parts(counts, 5)] == parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_keeps_hidden_units_of_one_slot_per_thread(mode, dtype, monkeypatch):
    counts, ffn, hidden = [5, 64, 0, *[64] * 13], 512, 8
    experts = make("swiglu", dtype, len(counts), hidden, ffn)
    rows, weights, per_slot = rows_of(experts, counts, dtype)
    expected = experts(rows, weights, per_slot)
    monkeypatch.setattr(gated, "can_compute_swiglu_slots", lambda *_: True)  # it is not, for one who watches
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with mode(), Allocations() as made:
        got = experts(rows, weights, per_slot)
    assert torch.equal(got, expected)
    padded = ffn + 64 // rows.element_size()
    of_fullest_slots = 3 * sum(sorted(counts)[-2:]) * padded * rows.element_size()
    assert made.num_bytes <= of_fullest_slots + got.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_are_named_as_the_parameters(kind):
    experts = build_experts(kind, 2, 6, 4)
    initial = experts.initial(seed=3, expert_id=7)
    assert {n: v.shape for n, v in initial.items()} == {n: p.shape[1:] for n, p in experts.named_parameters()}
    assert all(value.dtype == torch.float32 for value in initial.values())
    assert not any(p.any() for p in experts.parameters())


def test_generators_are_a_function_of_their_key():
    def draw(*key):
        return torch.rand(1, generator=seeded_generator(*key)).item()

    # The first 8 bytes of `printf 0/1/w1 | sha256sum`, halved. Changing it changes every model trained from a seed.
    assert seeded_generator(0, 1, "w1").initial_seed() == 1875803309526471118
    keys = [(1, 2, "w1"), (1, 2, "w2"), (1, 3, "w1"), (2, 2, "w1"), (12, "w1"), (1, 2, "w1", "noise")]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(*keys[0]) == draw(*keys[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("moe", 1, 1, 1), f"There is no expert called 'moe'. Use one of {', '.join(KINDS)}."),
        (("swiglu", 0, 1, 1), "slots on a rank is 0 but must be at least 1."),
        (("gelu", 1, -3, 1), "hidden_size is -3 but must be at least 1."),
        (("gelu", 1, 1, 0), "ffn_hidden_size is 0 but must be at least 1."),
    ],
)
def test_experts_that_cannot_be_built(arguments, message):
    with pytest.raises(ConfigError) as caught:
        build_experts(*arguments)
    assert str(caught.value) == message
