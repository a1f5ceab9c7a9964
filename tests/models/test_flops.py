"""FLOPs per token against what torch counts while the model runs."""

import pytest
import torch
from tests.helpers.run_config import small_run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, mm_flop
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import dynmoe_ds as dm
from dynmoe_ds.models import build_decoder, count_flops
from dynmoe_ds.models.flops import FlopCount
from dynmoe_ds.moe import MoELayer

VOCAB_SIZE, BATCH, LENGTH = 50, 3, 12
NO_LOSSES = dm.TopAnyConfig(diversity_weight=0.0, simplicity_weight=0.0)


def _decoder(kind: str, expert: str = "swiglu") -> nn.Module:
    """Torch's counter knows neither the fused attention of CPUs nor grouped_mm, which needs aligned sizes."""
    sizes = {"model__num_layers": 4, "model__expert_ffn_hidden_size": 30}
    config = small_run(router=NO_LOSSES, expert__kind=expert, **sizes)
    model = build_decoder(config, VOCAB_SIZE, eos_token_id=0)
    if kind == "dense":
        for index in (1, 3):
            model.model.layers[index].mlp = type(model.model.layers[0].mlp)(model.config)
    model.set_attn_implementation("eager")
    return model


def _counted(model: nn.Module, *, is_training: bool) -> tuple[int, dict[str, float]]:
    """What torch counts for one pass, and the mean k by layer."""
    ids = torch.randint(VOCAB_SIZE, (BATCH, LENGTH), generator=torch.Generator().manual_seed(4))
    # In-place addmm_ is missing from torch's table; it is one product, as addmm.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, *args, out_shape=None, **kwargs: mm_flop.__wrapped__(a, b)}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            module.name = name
    with counter, dm.StepLedger() as ledger:
        loss = model(input_ids=ids, labels=ids).loss
        if is_training:
            loss.backward()
    return counter.get_total_flops(), {name: record.mean_k for name, record in ledger.records().items()}


@pytest.mark.parametrize(("kind", "expert"), [("dense", "swiglu"), ("moe", "swiglu"), ("moe", "gelu")])
def test_the_decoder_costs_what_torch_counts(kind, expert):
    model = _decoder(kind, expert)
    count = count_flops(model, LENGTH)
    num_tokens = BATCH * LENGTH
    forward, mean_k = _counted(model, is_training=False)
    assert forward == pytest.approx(num_tokens * count.forward(mean_k), abs=1e-6)
    training, mean_k = _counted(model, is_training=True)
    assert training == pytest.approx(num_tokens * count.training(mean_k), abs=1e-6)
    assert len(mean_k) == (2 if kind == "moe" else 0)
    assert all(k != round(k) for k in mean_k.values()), "the example must have a mean k that is no whole number"


def _encoder_flops(model: nn.Module, is_training: bool = False, **inputs: torch.Tensor) -> int:
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(**inputs, labels=torch.zeros(BATCH, dtype=torch.int64)).loss
        if is_training:
            loss.backward()
    return counter.get_total_flops()


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def test_a_text_classifier_costs_what_torch_counts():
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCAB_SIZE, **SMALL))
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    count = count_flops(model, LENGTH)
    assert _encoder_flops(model, input_ids=ids) == pytest.approx(BATCH * LENGTH * count.forward({}), abs=1e-6)
    training = _encoder_flops(model, is_training=True, input_ids=ids)
    assert training == pytest.approx(BATCH * LENGTH * count.training({}), abs=1e-6)


def test_an_image_classifier_costs_what_torch_counts():
    model = ViTForImageClassification(ViTConfig(image_size=12, patch_size=4, num_channels=3, **SMALL))
    num_tokens = 9 + 1
    # The classifier's own token is no patch, though it is counted as one.
    surplus = BATCH * 2 * 3 * 4 * 4 * 32
    expected = BATCH * num_tokens * count_flops(model, num_tokens).forward({}) - surplus
    assert _encoder_flops(model, pixel_values=torch.zeros(BATCH, 3, 12, 12)) == pytest.approx(expected, abs=1e-6)


def test_worked_example():
    count = FlopCount(linear=100, attention=10, routers=1, per_expert={"a": 20, "b": 30})
    assert count.forward({"a": 1.5, "b": 2.0}) == 201.0
    assert count.training({"a": 1.5, "b": 2.0}) == 603.0


def test_a_model_of_convolutions_without_attention():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.Linear(32, 5), nn.Embedding(7, 9))
    count = count_flops(model, 4)
    assert count == FlopCount(linear=2 * (8 * 3 * 16 + 32 * 5), attention=0, routers=0, per_expert={})
