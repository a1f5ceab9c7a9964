import torch

from dynmoe_ds.moe import LayerTraffic
from tests.helpers.no_waiting import NoWaiting


class NoCopies(NoWaiting):
    """Fails at copies between devices, too: from pageable memory they wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_to_copy", "copy_"), "copies"
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_counting_copies_nothing_to_the_device_and_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    mask = torch.ones(5, 8, dtype=torch.bool, device="meta")
    with NoCopies():
        traffic = LayerTraffic()
        traffic.expect(mask, ep_size=2, row_bytes=64)
        total = LayerTraffic() + traffic + traffic
    assert total.least_row_bytes.device.type == "meta"


def test_the_least_is_a_row_there_and_back_for_every_other_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    traffic = LayerTraffic()
    traffic.expect(mask, ep_size=2, row_bytes=64)  # tokens 0 and 2 go to rank 0
    assert int(traffic.least_row_bytes) == 2 * 4 * 64
    with torch.no_grad():
        traffic.expect(mask, ep_size=2, row_bytes=64)
    assert int(traffic.least_row_bytes) == 2 * 6 * 64
