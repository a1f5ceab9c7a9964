"""Expert thresholds: decisions and moving averages as loops, and quantiles of the global batch from histograms."""

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import (
    ExpertThresholdConfig,
    RoutingRecords,
    build_router,
    router_config,
    update_routers,
)
from dynmoe_ds.routing.records import pack, unpack
from dynmoe_ds.routing.score_histogram import NUM_BINS, bin_edges, kth_greatest, score_histogram

ACTIVE = torch.tensor([True, True, False, True, True])


def router_and_tokens(config, num_tokens=200):
    generator = torch.Generator().manual_seed(0)
    router = build_router(config, 6, 5).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(5, 6, generator=generator))
    return router, torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64)


def step(router, *batches):
    """One optimiser step over these batches, as micro steps or as ranks."""
    records = [RoutingRecords.of(router(hidden, ACTIVE, None), hidden, None) for hidden in batches]
    total = records[0]
    for record in records[1:]:
        total = total + record
    update_routers({"a": router}, {"a": total}, {"a": ACTIVE})
    return total


def test_decisions_after_a_step():
    router, hidden = router_and_tokens(ExpertThresholdConfig(target_k=1.0, decay=0.0))
    step(router.train(), hidden)
    scores = hidden @ router.weight.T
    routing = router(hidden, ACTIVE, None)
    for e in range(5):
        want = [bool(ACTIVE[e]) and float(score) > float(router.threshold[e]) for score in scores[:, e]]
        assert routing.mask[:, e].tolist() == want
    assert torch.equal(routing.unrouted, ~routing.mask.any(1)) and routing.unrouted.any()
    torch.testing.assert_close(routing.weights, torch.where(routing.mask, torch.sigmoid(scores), 0.0).detach())
    # Every expert takes target_k / K = a quarter of the tokens, to the width of a bin.
    share = routing.mask.double().mean(0)[ACTIVE]
    assert (share - 0.25).abs().max() < 0.02


def test_the_quantile_is_that_of_all_tokens_together():
    config = ExpertThresholdConfig(target_k=1.0, decay=0.0)
    parts, whole = router_and_tokens(config)[0], router_and_tokens(config)[0]
    hidden = torch.randn(90, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hidden[:30] *= 4  # a rank whose scores are greater must not get the same share as the others
    total = step(parts.train(), hidden[:30], hidden[30:])
    step(whole.train(), hidden)
    assert torch.equal(parts.threshold, whole.threshold)
    scores = hidden @ parts.weight.T
    exact = torch.quantile(scores, 1 - 1.0 / 4, dim=0)
    edges = bin_edges()
    at = torch.bucketize(exact, edges).clamp(1, NUM_BINS)
    width = (edges[at] - edges[at - 1]) * 2
    assert ((parts.threshold - exact).abs() <= width)[ACTIVE].all()
    assert torch.equal(unpack(pack({"a": total}), {"a": total})["a"].statistics["scores"], total.statistics["scores"])


def test_the_moving_average_starts_up_as_adam_does():
    router, hidden = router_and_tokens(ExpertThresholdConfig(target_k=1.0, decay=0.9))
    seen, want = [], torch.zeros(5, dtype=torch.float64)
    for n in range(1, 6):
        batch = hidden * n
        once = router_and_tokens(ExpertThresholdConfig(target_k=1.0, decay=0.0))[0]
        step(once.train(), batch)
        seen.append(once.threshold.clone())
        step(router.train(), batch)
        weights = [0.1 * 0.9 ** (n - 1 - i) for i in range(n)]
        want = sum(w * s for w, s in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(router.threshold, want)


def test_before_the_first_step_about_the_share_passes():
    router, hidden = router_and_tokens(ExpertThresholdConfig(target_k=2.0), num_tokens=2000)
    with torch.no_grad():
        router.weight.copy_(torch.linalg.qr(torch.randn(6, 6).double())[0][:5] * 3)
    assert router.train()(hidden, ACTIVE, None).mask.sum(1).double().mean() == pytest.approx(2.0, rel=0.1)


def test_k_max_and_fallback_move_the_share_so_that_the_target_holds():
    config = ExpertThresholdConfig(target_k=1.5, decay=0.5, training_fallback="top_1", k_max=2)
    router, hidden = router_and_tokens(config, num_tokens=2000)
    for _ in range(30):
        total = step(router.train(), hidden)
    assert total.mean_k == pytest.approx(1.5, rel=0.03) and int(total.num_unrouted) > 0
    mask = router(hidden, ACTIVE, None).mask
    assert mask.sum(1).max() == 2 and mask.sum(1).min() == 1


def test_another_number_of_live_experts_starts_the_averages_anew():
    router, hidden = router_and_tokens(ExpertThresholdConfig(target_k=1.0, decay=0.99))
    for _ in range(5):
        step(router.train(), hidden)
    fewer = torch.tensor([True, True, False, False, False])
    record = RoutingRecords.of(router(hidden, fewer, None), hidden, None)
    update_routers({"a": router}, {"a": record}, {"a": fewer})
    assert router(hidden, fewer, None).mask.double().mean(0)[:2].tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert int(router.num_updates) == 1


def test_kth_greatest_of_a_histogram():
    scores = torch.randn(5000, 3, dtype=torch.float64) * torch.tensor([1.0, 100.0, 1e-3])
    histogram = score_histogram(scores, torch.ones_like(scores, dtype=torch.bool))
    assert histogram.sum(1).tolist() == [5000, 5000, 5000]
    for k in (1, 50, 2500, 4999):
        found = kth_greatest(histogram, torch.full((3,), float(k)))
        exact = scores.sort(0, descending=True).values[k - 1]
        # Positions are exact to a bin: what lies between the two is in one bin or two.
        between = ((scores > torch.minimum(found, exact)) & (scores < torch.maximum(found, exact))).sum(0)
        bins = torch.bucketize(torch.stack([found, exact]), bin_edges())
        assert ((bins[0] - bins[1]).abs() <= 1).all(), (k, between)
    counted = torch.zeros_like(scores, dtype=torch.bool)
    counted[:10] = True
    assert score_histogram(scores, counted).sum(1).tolist() == [10, 10, 10]


def test_the_state_is_in_the_state_dict_and_keeps_its_precision():
    router, hidden = router_and_tokens(ExpertThresholdConfig())
    step(router.train(), hidden)
    other = router_and_tokens(ExpertThresholdConfig())[0]
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(hidden, ACTIVE, None).mask, router(hidden, ACTIVE, None).mask)
    assert router.bfloat16().threshold.dtype == torch.float64


def test_training_holds_the_target():
    torch.manual_seed(0)
    layer = dm.MoELayer(
        hidden_size=16,
        ffn_hidden_size=16,
        num_experts=8,
        num_slots=8,
        router=ExpertThresholdConfig.recommended(),
        seed=0,
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    found = []
    for _ in range(150):
        x = torch.randn(256, 16) + 0.5
        with dm.StepLedger() as ledger:
            loss = (layer(x) - x.roll(1, 1).tanh()).square().mean()
        (loss + ledger.aux_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        (record,) = ledger.records().values()
        update_routers({"a": layer.router}, {"a": record}, {"a": layer.active})
        found.append(record.mean_k)
    assert abs(sum(found[-30:]) / 30 / 2.0 - 1) < 0.05, found[-30:]


def test_faults():
    with pytest.raises(ConfigError) as caught:
        router_config(ExpertThresholdConfig(target_k=-1.0, decay=1.0, k_max=0, training_fallback="top_2"))  # type: ignore[arg-type]
    assert [fault.split()[0] for fault in caught.value.faults] == [
        f"router.{name}" for name in ("target_k", "decay", "training_fallback", "k_max")
    ]
    with pytest.raises(ConfigError, match=r"router.target_k is 1.0 but must be a finite number above 1"):
        router_config(ExpertThresholdConfig(target_k=1.0, training_fallback="top_1"))
    with pytest.raises(ConfigError, match=r"no token may take more than router.k_max \(1\)"):
        router_config(ExpertThresholdConfig(k_max=1))
