from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.integrations import megatron
from dynmoe_ds.integrations.megatron import (
    MegatronGroups,
    MegatronMoELayer,
    find_megatron,
    megatron_module,
    moe_layer_spec,
)
from tests.helpers.megatron import needs_megatron
from tests.helpers.megatron_gpt import train_gpt
from tests.helpers.spawn import run_ranks


def test_an_installed_megatron_core_is_told_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution as pip leaves it; its code is not looked at."""
    info = tmp_path / "megatron_core-0.16.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.16.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_megatron() == "0.16.1"


def test_no_megatron_core_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "DISTRIBUTION", "no-distribution-has-this-name")
    assert find_megatron() is None


def test_whatever_needs_a_missing_megatron_core_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "find_megatron", lambda: None)
    for needed_for, action in {
        "moe_layer_spec": lambda: moe_layer_spec(num_experts=2, num_slots=4),
        "MegatronGroups": MegatronGroups,
    }.items():
        with pytest.raises(ConfigError) as caught:
            action()
        assert str(caught.value).startswith(
            f"{needed_for} needs megatron-core, which is not installed. Install it with `pip install "
            "'dynmoe-ds[megatron]'`"
        )


def _transformer_config(**changes: Any) -> Any:
    values = {"hidden_size": 8, "ffn_hidden_size": 12, "moe_ffn_hidden_size": None, "params_dtype": torch.float32}
    return SimpleNamespace(**values | {"sequence_parallel": False, "tensor_model_parallel_size": 1} | changes)


@needs_megatron
def test_the_layer_takes_sizes_and_dtype_from_megatron_and_whatever_else_it_is_told() -> None:
    build = megatron_module("transformer.spec_utils", "this test").build_module
    spec = moe_layer_spec(num_experts=2, num_slots=4, expert="gelu", router="top_k")
    config = _transformer_config(moe_ffn_hidden_size=20, params_dtype=torch.bfloat16)
    layer = build(spec, config=config, is_mtp_layer=False, name="mlp", pg_collection=None)
    assert isinstance(layer, MegatronMoELayer)
    assert layer.experts.w1.shape == (4, 20, 8) and layer.experts.w1.dtype == torch.bfloat16
    assert layer.experts.get_parameter("b1").shape == (4, 20) and type(layer.router.config).__name__ == "TopKConfig"
    with pytest.raises(ConfigError, match=r"^sequence_parallel does not work with moe_layer_spec\. Set it to False"):
        build(spec, config=_transformer_config(sequence_parallel=True))


@needs_megatron
def test_padding_is_told_in_megatrons_way() -> None:
    """Its mask is [B, L] and True for padding, beside hidden states [L, B, D]."""
    settings = {"num_experts": 2, "num_slots": 4, "seed": 3, "router": "top_k"}  # no token goes without
    layer = MegatronMoELayer(_transformer_config(), settings)
    plain = dm.MoELayer(hidden_size=8, ffn_hidden_size=12, **settings)
    x = torch.randn(3, 2, 8)
    padding = torch.tensor([[False, False, True], [False, True, True]])
    y, bias = layer(x, padding_mask=padding)
    assert bias is None
    torch.testing.assert_close(y, plain(x, token_mask=~padding.T))
    assert not y[2].any() and not y[1, 1].any() and y[0].any()
    torch.testing.assert_close(layer(x)[0], plain(x))


def _train_gpt(rank: int, world_size: int) -> dict[str, Any]:
    megatron_module("parallel_state", "this test").initialize_model_parallel()
    return train_gpt(ep_size=1, tp_size=1)


@needs_megatron
def test_a_model_of_megatron_core_learns_with_experts_that_grow() -> None:
    result = run_ranks(_train_gpt, 1, timeout_s=120)[0]
    assert result["losses"] == sorted(result["losses"], reverse=True)
    assert result["losses"][-1] < result["losses"][0] - 0.4
    assert [sum(map(len, live.values())) for live in result["live"]] == [6, 6, 8, 8, 8, 8]
