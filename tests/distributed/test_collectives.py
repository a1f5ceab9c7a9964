"""Agreement, groups and flights, on real ranks."""

import time
import weakref

import pytest
import torch
import torch.distributed as dist

from dynmoe_ds.distributed import (
    Flight,
    Parcel,
    Splits,
    Traffic,
    assert_same_on_all_ranks,
    current_layout,
    exchange_counts,
    expert_parallel_group,
    node_groups,
    raise_together,
    take_from_first_rank,
)
from dynmoe_ds.errors import ConfigError
from tests.helpers.spawn import run_ranks


def test_one_rank_always_agrees():
    assert not dist.is_initialized()
    assert_same_on_all_ranks("anything", {"a": 1})
    raise_together(None)
    with pytest.raises(ConfigError, match="mine"):
        raise_together(ConfigError("mine"))
    value = torch.tensor([1.0, 2.0])
    take_from_first_rank(value)
    assert value.tolist() == [1.0, 2.0]


def _message(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _agreement(rank: int, world_size: int) -> dict[str, str]:
    group = expert_parallel_group(2)
    found = {
        "same": _message(assert_same_on_all_ranks, "it", {"a": (1, "x"), "b": None, "c": torch.float32}),
        "one differs": _message(assert_same_on_all_ranks, "the plan", {"a": 1, "slot": 7 if rank == 2 else 5}),
        "absent": _message(assert_same_on_all_ranks, "keys", {"a": 1} if rank else {}),
        "all differ": _message(assert_same_on_all_ranks, "ranks", {"rank": rank}),
        "long": _message(assert_same_on_all_ranks, "text", {"text": "x" * 100 + str(rank % 2)}),
        "long end": _message(assert_same_on_all_ranks, "text", {"text": str(rank % 2) + "x" * 100}),
        "within groups": _message(assert_same_on_all_ranks, "groups", {"group": rank // 2}, group),
        "order": _message(assert_same_on_all_ranks, "maps", {"a": {"x": 1, "y": 2} if rank else {"y": 2, "x": 1}}),
        "nobody fails": _message(raise_together, None),
        "two fail": _message(raise_together, ConfigError(f"no on {rank}") if rank in (1, 3) else None),
        "in a group": _message(raise_together, ValueError("oh") if rank == 2 else None, group),
    }
    dist.barrier()  # nobody hangs
    return found


def test_agreement():
    ranks = run_ranks(_agreement, 4)

    def same_everywhere(key: str) -> str:
        assert len({found[key] for found in ranks}) == 1, key
        return ranks[0][key]

    assert same_everywhere("same") == same_everywhere("order") == same_everywhere("within groups") == "nothing"
    assert same_everywhere("one differs") == (
        "DivergenceError: The ranks disagree on the plan. slot is 5 on rank 0, 1, 3, 7 on rank 2. "
        "Start all ranks alike."
    )
    assert "a is absent on rank 0, 1 on rank 1, 2, 3." in same_everywhere("absent")
    assert "rank is 0 on rank 0, 1 on rank 1, 2 on rank 2, 3 on rank 3." in same_everywhere("all differ")
    assert '"1xxx' in same_everywhere("long end") and "x…" in same_everywhere("long end")
    assert "on rank 0, 2," in same_everywhere("long")

    assert same_everywhere("nobody fails") == "nothing"
    stops = "DivergenceError: Another rank failed, so this one stops too."
    others = f"{stops} rank 1: ConfigError: no on 1; rank 3: ConfigError: no on 3"
    assert [found["two fail"] for found in ranks] == [others, "ConfigError: no on 1", others, "ConfigError: no on 3"]
    assert [found["in a group"] for found in ranks] == [
        "nothing",
        "nothing",
        "ValueError: oh",
        f"{stops} rank 0: ValueError: oh",
    ]


def _groups(rank: int, world_size: int) -> None:
    for ep_size in (1, 2, 4):
        group = expert_parallel_group(ep_size)
        assert expert_parallel_group(ep_size) is group  # made once
        first = rank // ep_size * ep_size
        assert dist.get_process_group_ranks(group) == list(range(first, first + ep_size))
        layout = current_layout(ep_size)
        assert (layout.world_size, layout.rank, layout.ep_rank) == (4, rank, dist.get_rank(group))
    between, within = node_groups(4, 2)
    assert node_groups(4, 2)[0] is between
    assert dist.get_process_group_ranks(between) == [rank % 2, rank % 2 + 2]
    assert dist.get_process_group_ranks(within) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert _message(expert_parallel_group, 3).startswith("ConfigError: ep_size is 3 but must divide the 4")


def _tensor(source: int, target: int, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.arange(num_rows, dtype=dtype)[:, None] + torch.arange(width, dtype=dtype) / 8
    return rows + 32 * source + 4 * target


def _flights(rank: int, world_size: int) -> None:
    """Rows from p to q are known to both, so what must arrive is written down without communication."""
    group = dist.group.WORLD
    for counts in ("uneven", "empty", "one row", "all to the last"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            sizes = {
                "uneven": lambda p, q: (3 * p + q) % 4,
                "empty": lambda p, q: 0,
                "one row": lambda p, q: int((p, q) == (1, 0)),
                "all to the last": lambda p, q: 2 * int(q == world_size - 1),
            }[counts]
            ranks = range(world_size)
            sent, received = [sizes(rank, q) for q in ranks], [sizes(p, rank) for p in ranks]
            traffic = Traffic()
            assert exchange_counts(torch.tensor(sent)[:, None], group, traffic).flatten().tolist() == received
            assert (traffic.row_bytes, traffic.metadata_bytes) == (0, 8 * (world_size - 1))

            splits = Splits(sent=sent, received=received)
            wide = torch.cat([_tensor(rank, q, n, 3, dtype) for q, n in enumerate(sent)]).requires_grad_()
            thin = wide.detach()[:, 0].clone().requires_grad_()
            whole = wide.detach()[:, 1].to(torch.uint8)
            parcels = [
                Parcel(tensor=wide * 1, splits=splits),
                Parcel(tensor=whole, splits=splits, freight="metadata"),
                Parcel(tensor=thin * 1, splits=splits, freight="metadata"),
            ]
            # Two in the air at once; both wait in the order of their start.
            flights = [Flight(parcels, group, traffic), Flight(parcels, group)]
            got_wide, got_whole, got_thin = flights[0].wait()
            again, _, _ = flights[1].wait()
            assert torch.equal(got_wide, torch.cat([_tensor(p, rank, n, 3, dtype) for p, n in enumerate(received)]))
            assert torch.equal(again, got_wide) and torch.equal(got_thin, got_wide[:, 0])
            assert torch.equal(got_whole, got_wide[:, 1].to(torch.uint8)) and not got_whole.requires_grad
            abroad = sum(sent) - sent[rank]
            size = dtype.itemsize
            assert traffic.row_bytes == abroad * 3 * size
            assert traffic.metadata_bytes == 8 * (world_size - 1) + abroad * (1 + size)

            sent_rows = [weakref.ref(parcels[0].tensor), weakref.ref(parcels[2].tensor)]
            del parcels
            deadline = time.monotonic() + 10  # gloo's own thread lets go of what it has sent a moment after the wait
            while any(ref() is not None for ref in sent_rows) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert [ref() for ref in sent_rows] == [None, None], "what was sent stays alive"

            # Each row comes back as a gradient, multiplied by the rank that had it; the other tensor gets zeros.
            (got_wide * (rank + 1) * got_wide.detach() + 0 * again).sum().backward()
            scale = torch.cat([torch.full((n, 1), q + 1.0, dtype=dtype) for q, n in enumerate(sent)])
            assert torch.equal(wide.grad, wide.detach() * scale)
            assert thin.grad is not None and not thin.grad.any()
            returned = sum(received) - received[rank]
            assert traffic.row_bytes == (abroad + returned) * 3 * size
            assert traffic.metadata_bytes == 8 * (world_size - 1) + abroad * (1 + size) + returned * size


def _groups_and_flights(rank: int, world_size: int) -> None:
    _groups(rank, world_size)
    _flights(rank, world_size)
    for dtype in (torch.float64, torch.bool):
        value = torch.tensor([[rank == 0], [rank == 2]], dtype=dtype)
        take_from_first_rank(value)
        assert value.flatten().tolist() == [True, False]


def test_groups_and_flights():
    run_ranks(_groups_and_flights, 4)
