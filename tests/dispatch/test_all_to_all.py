"""Experts on several ranks give what one rank gives, forwards and backwards, without an engine."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.distributed import Flight
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.experts.gated import GatedExperts, GatedOfAllSlots
from dynmoe_ds.moe.token_sampler import TokenSampler
from dynmoe_ds.routing import records
from tests.helpers.no_waiting import NoWaiting
from tests.helpers.reference import assert_near, randomise
from tests.helpers.spawn import run_ranks

EXPERTS, SLOTS = 6, 8

# Tokens of each rank (of as many as there are), and thresholds by expert id that replace the random ones.
CASES: dict[str, tuple[tuple[int, ...], dict[int, float]]] = {
    "uneven": ((11, 3, 7, 20), {}),
    "a rank without tokens": ((9, 0, 4, 0), {}),
    "no tokens at all": ((0, 0, 0, 0), {}),
    "one token": ((1, 0, 0, 0), {}),
    "an expert without rows": ((11, 3, 7, 5), {2: 2.0}),
    "nobody routed": ((5, 3, 2, 1), dict.fromkeys(range(EXPERTS), 2.0)),
    "everything to the first rank": ((5, 8, 3, 2), {0: -2.0} | dict.fromkeys(range(1, EXPERTS), 2.0)),
    "everything to the last rank": ((5, 0, 3, 2), {EXPERTS - 1: -2.0} | dict.fromkeys(range(EXPERTS - 1), 2.0)),
    "everything to everybody": ((5, 6, 0, 2), dict.fromkeys(range(EXPERTS), -2.0)),
}


FLAT = dm.DispatchConfig()
WAYS = (
    FLAT,
    dm.DispatchConfig(chunks=3),
    dm.DispatchConfig(ranks_per_node=2),
    dm.DispatchConfig(chunks=2, ranks_per_node=2),
)


def make(
    case: str, ep_size: int, dtype: torch.dtype, expert: str, router: str, dispatch: dm.DispatchConfig = FLAT
) -> dm.MoELayer:
    layer = dm.MoELayer(
        hidden_size=8,
        ffn_hidden_size=16,
        num_experts=EXPERTS,
        num_slots=SLOTS,
        ep_size=ep_size,
        expert=expert,
        router=router,
        seed=0,
        dispatch=dispatch,
    )
    randomise(layer.to(dtype))
    with torch.no_grad():
        for expert_id, threshold in CASES[case][1].items():
            layer.router.threshold[layer.placement.slot_of(expert_id)] = threshold
    return layer


def run(layer: dm.MoELayer, x: Tensor, recompute: bool = False) -> dict[str, Tensor]:
    """Output and gradients of one rank's tokens."""
    x = x.clone().requires_grad_()
    with dm.StepLedger() as ledger:
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    layer.zero_grad()  # sets to None, so the gradients of the last run stay as they are
    (y.square().sum() + ledger.aux_loss()).backward()
    grads = {name: param.grad for name, param in layer.named_parameters()}
    assert all(grad is not None for grad in (x.grad, *grads.values()))
    return {"y": y.detach(), "x": x.grad} | grads


def _equal_to_one_rank(rank: int, world_size: int, ep_size: int, cases: list[tuple[Any, ...]]) -> list[int]:
    num_rows = []
    for case, dtype, expert, router, dispatch in cases:
        counts = CASES[case][0][:world_size]
        hidden = torch.randn(sum(counts), 8, generator=torch.Generator().manual_seed(3)).to(dtype).split(counts)
        layer = make(case, ep_size, dtype, expert, router, dispatch)
        layer.experts.register_forward_pre_hook(lambda _, args: num_rows.append(len(args[0])))
        got = run(layer, hidden[rank])

        alone = make(case, 1, dtype, expert, router)
        first = rank // ep_size * ep_size
        by_rank = {r: run(alone, hidden[r]) for r in range(first, first + ep_size)}
        for name, value in got.items():
            if name.startswith("experts."):  # gradients of all tokens of the group, of the slots here
                parts = [result[name].double() for result in by_rank.values()]
                want = sum(parts)[layer.local_slots.start : layer.local_slots.stop]
            else:
                want = by_rank[rank][name]
            assert_near(value, want, what=f"{name}: {case}, {dtype}, {expert}, {router}, {dispatch}")

        for recompute in (False, True):
            again = run(layer, hidden[rank], recompute)
            assert all(torch.equal(again[name], value) for name, value in got.items()), f"not repeatable, {recompute=}"
    return num_rows


LAYOUTS = {"EP 2": (2, 2), "EP 4": (4, 4), "EP 2 x 2": (4, 2)}


@pytest.mark.parametrize(("world_size", "ep_size"), LAYOUTS.values(), ids=LAYOUTS)
def test_expert_parallel_equals_one_rank(world_size, ep_size):
    cases: list[tuple[Any, ...]] = [
        (case, torch.float64, "swiglu", "top_any", way) for way in WAYS[: 4 if ep_size == 4 else 2] for case in CASES
    ]
    cases += [(case, torch.bfloat16, "gelu", "top_any_recommended", FLAT) for case in CASES]
    cases += [("uneven", torch.float32, expert, "top_any_recommended", FLAT) for expert in ("swiglu", "gelu")]
    cases += [("a rank without tokens", torch.float32, "swiglu", "top_any_authors_code", WAYS[1])]
    rows = run_ranks(_equal_to_one_rank, world_size, ep_size, cases)
    # The cases do what their names say.
    counts = CASES["everything to the first rank"][0][:ep_size]
    at = 4 * list(CASES).index("everything to the first rank")  # of each case three runs and a recomputation
    assert [r[at] for r in rows[:ep_size]] == [sum(counts)] + [0] * (ep_size - 1)


def _groups_without_communication_between_them(rank: int, world_size: int) -> int:
    """Replicas of an expert-parallel group may call a different number of times: no world collective in forward."""
    layer = make("uneven", 2, torch.float32, "swiglu", "top_any")
    layer(torch.ones(1, 8))  # joins the group, over all ranks
    for _ in range(1 + rank // 2):
        layer(torch.ones(rank, 8))
    assert dist.get_world_size(layer.ep_group) == 2
    return 1 + rank // 2


def test_replicas_may_call_a_different_number_of_times():
    assert run_ranks(_groups_without_communication_between_them, 4) == [1, 1, 2, 2]


# One of each kind, and the presets with most controllers; `tests/moe/test_static_shapes.py` goes through all.
ROUTERS = ("expert_threshold", "relu_budget", "top_any_budget", "top_any_recommended", "top_k", "top_p_budget")


def _waits_of_the_host(rank: int, world_size: int) -> dict[str, int]:
    """How often a layer asks for a tensor's values, by way of dispatch; anything but `tolist` fails.

    Everything that can be recorded is: records, strain, kinds of tokens and a sample of them, with padding.
    """
    lists = []
    real = Tensor.tolist
    Tensor.tolist = lambda self: lists.append(1) or real(self)
    real_sum_of = records.sum_of
    records.sum_of = lambda *args, may_wait: real_sum_of(*args, may_wait=False)  # as on a GPU
    of_all_slots(GatedExperts)
    num_tokens = 5 + rank
    tokens = torch.arange(num_tokens)
    for way in WAYS:  # makes the groups
        make("uneven", 4, torch.float32, "gelu", "top_any", way)(torch.zeros(1, 8))
    found = {}
    for router, expert, dispatch in (
        *(("top_any", "gelu", way) for way in WAYS),
        *((name, "swiglu", FLAT) for name in ROUTERS),
        ("top_k", "geglu", WAYS[3]),
    ):
        layer = make("uneven", 4, torch.float32, expert, router, dispatch)
        x = torch.randn(num_tokens, 8, requires_grad=True)
        given = {"with_strain": True, "sampler": TokenSampler(3), "token_kinds": tokens % 3 - 1, "num_kinds": 2}
        lists.clear()
        with NoWaiting(), dm.StepLedger(**given) as ledger:
            (layer(x, token_mask=tokens > 0).square().sum() + ledger.aux_loss()).backward()
        found[f"{router}, {expert}, {dispatch}"] = len(lists)
        ((_, record),) = ledger.records().items()
        assert record.num_tokens == num_tokens - 1 and record.statistics["tokens_per_kind"].sum() > 0
    return found


def of_all_slots(experts: type[GatedExperts]) -> None:
    """Let gated experts compute as on a GPU; on a CPU they ask for the rows of every slot."""

    def forward(self: GatedExperts, rows: Tensor, weights: Tensor, rows_per_slot: Tensor) -> Tensor:
        slot_ends = rows_per_slot.cumsum(0, dtype=torch.int32)
        return GatedOfAllSlots.apply(rows, weights, slot_ends, self.w1, self.w3, self.w2, self.activation)

    experts.forward = forward


def test_the_host_waits_for_the_device_once_per_layer():
    for of_rank in run_ranks(_waits_of_the_host, 4):
        assert set(of_rank.values()) == {1}, of_rank
        assert len(of_rank) == len(WAYS) + len(ROUTERS) + 1


class CountedBytes:
    """Bytes that this rank gives to torch.distributed for other ranks, rows [*, D] and the rest apart."""

    def __init__(self, hidden_size: int) -> None:
        self.rows = self.rest = self.calls = 0
        send = dist.all_to_all_single

        def counted(output, tensor, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
            size, own = group.size(), group.rank()
            splits = input_split_sizes or [len(tensor) // size] * size
            num_bytes = (sum(splits) - splits[own]) * tensor[:1].numel() * tensor.element_size()
            if tensor.dim() == 2 and tensor.shape[1] == hidden_size and tensor.is_floating_point():
                self.rows += num_bytes
            else:
                self.rest += num_bytes
            self.calls += 1
            return send(output, tensor, output_split_sizes, input_split_sizes, group=group, async_op=async_op)

        self._counted, self._send = counted, send

    def __enter__(self) -> "CountedBytes":
        dist.all_to_all_single = self._counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single = self._send


WIDTH = 256
BYTE_CASES = ((1, torch.float32), (2, torch.float32), (6, torch.float32), (2, torch.bfloat16))


def _bytes_on_the_wire(rank: int, world_size: int) -> list[dict[str, Any]]:
    found = []
    for k, dtype in BYTE_CASES:
        for dispatch in WAYS:
            layer = dm.MoELayer(
                hidden_size=WIDTH,
                ffn_hidden_size=16,
                num_experts=16,
                num_slots=16,
                ep_size=4,
                router=dm.TopKConfig(k=k),
                seed=0,
                dispatch=dispatch,
            ).to(dtype)
            layer.name = "the layer"
            drawn = torch.randn(200 + 30 * rank, WIDTH, generator=torch.Generator().manual_seed(rank))
            x = drawn.to(dtype).requires_grad_()
            masks: list[Tensor] = []
            layer.router.register_forward_hook(lambda _, args, routing, masks=masks: masks.append(routing.mask))
            layer(x[:3])  # makes the groups
            with CountedBytes(WIDTH) as counted, dm.StepLedger() as ledger:
                y = layer(x)
                forward = counted.rows
                y.square().sum().backward()
                trained, rows, rest = counted.calls, counted.rows, counted.rest
                with torch.inference_mode():
                    layer.eval()(x[:1])
            traffic = ledger.traffic()["the layer"]
            found.append(
                {
                    "mask": masks[1],
                    "forward": forward,
                    "rows": rows,
                    "rest": rest,
                    "calls": (trained, counted.calls - trained),
                    "sent": (traffic.sent.row_bytes, traffic.sent.metadata_bytes),
                    "least": int(traffic.least_row_bytes),
                }
            )
    return found


def test_bytes_on_the_wire_are_the_fewest_that_the_masks_allow():
    """Every token once to every other rank, or node, with an expert that it chose; back; and both ways again."""
    ranks = run_ranks(_bytes_on_the_wire, 4)
    cases = [(k, dtype, dispatch) for k, dtype in BYTE_CASES for dispatch in WAYS]
    for i, (_, dtype, dispatch) in enumerate(cases):
        found = [of_rank[i] for of_rank in ranks]
        least = between_nodes = within_nodes = 0
        for home, of_rank in enumerate(found):
            for token in of_rank["mask"].tolist():
                wanted = {slot // 4 for slot in range(16) if token[slot]}
                least += len(wanted - {home})
                if dispatch.ranks_per_node:
                    nodes = {rank // 2 for rank in wanted}
                    between_nodes += len(nodes - {home // 2})
                    # In each node from the rank at home's own position to those with the experts.
                    within_nodes += sum(2 * (rank // 2) + home % 2 != rank for rank in wanted)
        num_rows = between_nodes + within_nodes if dispatch.ranks_per_node else least
        row_bytes = WIDTH * dtype.itemsize
        assert sum(of_rank["forward"] for of_rank in found) == 2 * num_rows * row_bytes, cases[i]
        assert sum(of_rank["rows"] for of_rank in found) == 4 * num_rows * row_bytes, cases[i]
        # The counter in the ledger says what torch.distributed was given, and the least comes from the masks alone.
        for of_rank in found:
            assert of_rank["sent"] == (of_rank["rows"], of_rank["rest"])
        assert sum(of_rank["least"] for of_rank in found) == 4 * least * row_bytes
        assert sum(of_rank["rest"] for of_rank in found) < 0.05 * sum(of_rank["rows"] for of_rank in found), cases[i]
        if dispatch == FLAT:
            # Counts; rows, slots and weights; rows back; and rows, rows and weights in the backward pass. However many
            # experts there are, also for one token.
            assert {of_rank["calls"] for of_rank in found} == {(8, 5)}
        if dispatch.ranks_per_node:
            assert between_nodes < least, "a token goes once to a node"


def _order_of_work(rank: int, world_size: int) -> dict[str, list[str]]:
    """What a layer in two chunks with a shared module does one after another."""
    order: list[str] = []
    send, wait = Flight._send, Flight._land

    def noted_send(self, tensor, splits, freight):
        order.append("send" if freight == "rows" else "send metadata")
        return send(self, tensor, splits, freight)

    def noted_wait(self):
        order.append("wait")
        wait(self)

    layer = make("uneven", 2, torch.float32, "swiglu", "top_any", dm.DispatchConfig(chunks=2))
    layer.shared = torch.nn.Linear(8, 8)
    for name, module in (("experts", layer.experts), ("shared", layer.shared)):
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        module.register_full_backward_pre_hook(lambda *_, name=name: order.append(name))
    x = torch.randn(9, 8, requires_grad=True)
    layer(x)  # makes the group
    Flight._send, Flight._land = noted_send, noted_wait
    order.clear()
    y = layer(x)
    forward = list(order)
    order.clear()
    y.square().sum().backward()
    return {"forward": forward, "backward": order}


def test_rows_of_one_chunk_travel_while_the_experts_compute_another():
    away, metadata = ["send metadata", "send", "send metadata"], ["send", "send metadata"]
    for found in run_ranks(_order_of_work, 2):
        assert found["forward"] == [
            *(away * 2),  # bits; rows and weights
            "shared",
            *["wait", "experts", "send"] * 2,
            *["wait"] * 2,
        ]
        # The mirror image; gradients of rows and weights go back together.
        backward = [step for step in found["backward"] if step != "shared"]
        assert backward == [*["send"] * 2, *["wait", "experts", *metadata] * 2, *["wait"] * 2]
        assert found["backward"].index("shared") < len(found["backward"]) - 2, "beside the gradients of the rows"


def _in_anomaly_mode(rank: int, world_size: int) -> None:
    """Gradients leave a node before they are there; torch's search for NaN must not read them too early."""
    layer = make("uneven", 2, torch.float32, "swiglu", "top_any")
    x = torch.randn(9, 8, requires_grad=True)
    layer(x)
    send = dist.all_to_all_single

    class Late:
        """Work whose result is there only when it was waited for."""

        def __init__(self, output, *args, **kwargs) -> None:
            self.output, self.arrived = output, torch.empty_like(output)
            self.work = send(self.arrived, *args, **kwargs)
            output.fill_(torch.nan)

        def wait(self) -> None:
            self.work.wait()
            self.output.copy_(self.arrived)

    def late(output, *args, async_op=False, **kwargs):
        is_late = async_op and output.is_floating_point()
        return (
            Late(output, *args, async_op=True, **kwargs)
            if is_late
            else send(output, *args, async_op=async_op, **kwargs)
        )

    dist.all_to_all_single = late
    with torch.autograd.detect_anomaly():
        layer(x).square().sum().backward()
    assert x.grad.isfinite().all()


def test_anomaly_mode_reads_nothing_that_is_under_way():
    run_ranks(_in_anomaly_mode, 2)


def _shared_module(rank: int, world_size: int) -> None:
    """A module for all tokens adds its output, whatever the layout; its gradient is that of the tokens here."""
    torch.manual_seed(1)
    shared = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.GELU(), torch.nn.Linear(12, 8)).double()
    x = torch.randn(9 + rank, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    real = torch.arange(9 + rank) != 4
    for dispatch in WAYS:
        plain = make("uneven", 4, torch.float64, "swiglu", "top_any", dispatch)
        layer = make("uneven", 4, torch.float64, "swiglu", "top_any", dispatch)
        layer.shared = shared
        calls: list[int] = []
        hook = shared.register_forward_hook(lambda _, args, out, calls=calls: calls.append(len(out)))
        want = plain(x, real) + torch.where(real[:, None], shared(x), 0.0)
        (gradient,) = torch.autograd.grad(want.square().sum(), shared[0].weight)
        calls.clear()
        got = layer(x, real)
        hook.remove()
        assert calls == [len(x)], "once for all tokens"
        assert_near(got, want, what=str(dispatch))
        assert not got[4].any()
        got.square().sum().backward()
        assert_near(shared[0].weight.grad, gradient, what=str(dispatch))
        shared.zero_grad()
        plain.zero_grad()


def test_a_module_that_all_tokens_pass():
    run_ranks(_shared_module, 4)


@pytest.mark.parametrize(
    ("dispatch", "ep_size", "message"),
    [
        (dm.DispatchConfig(chunks=0), 1, "dispatch.chunks is 0 but must be at least 1."),
        (dm.DispatchConfig(ranks_per_node=0), 1, "dispatch.ranks_per_node is 0 but must be at least 1."),
        (dm.DispatchConfig(ranks_per_node=3), 4, "dispatch.ranks_per_node is 3 and ep_size 4, but one must divide"),
    ],
)
def test_dispatch_that_cannot_work(dispatch, ep_size, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=message):
        make("uneven", ep_size, torch.float32, "swiglu", "top_any", dispatch)
