import pytest

from dynmoe_ds.distributed import Layout, current_layout, ep_size_fault
from dynmoe_ds.errors import ConfigError


def test_groups_are_neighbouring_ranks():
    layout = Layout(world_size=8, rank=5, ep_size=4)
    assert layout.ep_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.ep_rank == 1


def test_with_tensor_parallelism_groups_stay_in_their_lane():
    """DeepSpeed's own example for experts, model and data: 16 ranks, 2 with the same tokens, 4 sharing experts."""
    layouts = [Layout(world_size=16, rank=rank, ep_size=4, tp_size=2) for rank in range(16)]
    assert layouts[0].ep_groups() == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert [layout.ep_rank for layout in layouts] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert (layouts[5].ep_group(), layouts[5].expert_data_parallel_group()) == ([1, 3, 5, 7], [5, 13])
    assert layouts[12].local_slots(8) == range(4, 6)


@pytest.mark.parametrize(("rank", "slots"), [(0, range(3)), (1, range(3, 6)), (2, range(3)), (3, range(3, 6))])
def test_slots_of_a_rank(rank, slots):
    assert Layout(world_size=4, rank=rank, ep_size=2).local_slots(6) == slots


def test_layout_without_process_groups(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert current_layout(1) == Layout(world_size=1, rank=0, ep_size=1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert current_layout(2) == Layout(world_size=4, rank=3, ep_size=2)
    with pytest.raises(ConfigError, match=r"ep_size is 3 but must divide the 4 data-parallel ranks\. Use 1, 2 or 4\."):
        current_layout(3)


@pytest.mark.parametrize(
    ("ep_size", "num_ranks", "fault"),
    [
        (2, 8, None),
        (1, 1, None),
        (3, 8, "ep_size is 3 but must divide the 8 data-parallel ranks. Use 1, 2, 4 or 8."),
        (0, 2, "ep_size is 0 but must divide the 2 data-parallel ranks. Use 1 or 2."),
        (-2, 2, "ep_size is -2 but must divide the 2 data-parallel ranks. Use 1 or 2."),
        (16, 3, "ep_size is 16 but must divide the 3 data-parallel ranks. Use 1 or 3."),
        (
            2,
            1,
            "ep_size is 2 but there is one data-parallel rank. Use 1, or start more ranks with a launcher "
            "(launch/local.sh, deepspeed or torchrun).",
        ),
    ],
)
def test_ep_size_fault(ep_size, num_ranks, fault):
    assert ep_size_fault(ep_size, num_ranks) == fault
