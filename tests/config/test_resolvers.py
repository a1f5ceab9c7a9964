"""Values in YAML that are computed from others."""

import pytest

from dynmoe_ds.config.load import load_config
from dynmoe_ds.errors import ConfigError

RECIPE = ["experiment=glue_bert_large", "model.pretrained=bert", "data.path=glue_data", "run_dir=runs/never-made"]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 1146),  # 10 x 3668 / 32 = 1146.25
        (["training.steps=${steps_of_epochs:3}"], 344),  # 343.9
        (["training.gradient_accumulation_steps=2", "training.micro_batch_size=8"], 2292),  # 2292.5, to even
        (["parallel.num_ranks=4"], 287),  # 286.6
        (["data.task=wnli"], 198),  # 198.4
        (["data.num_train=64"], 20),
        (["data.num_train=1", "adaptation=none"], 1),
    ],
)
def test_steps_of_epochs(overrides, steps):
    assert load_config([*RECIPE, *overrides]).training.steps == steps


def test_share_of_is_rounded_down():
    config = load_config(["training.steps=109", "adaptation=recommended", "run_dir=runs/never-made"])
    assert config.adaptation.last_growth_step == 43


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("data=pydoc_topics", "training.steps is None (null) but must be a whole number."),
        ("training.micro_batch_size=none", "training.steps is None (null) but must be a whole number."),
        ("training.micro_batch_size=0", "training.micro_batch_size is 0 but must be at least 1."),
        ("data.task=race", "data.num_train is None (null) but must be a whole number."),
    ],
)
def test_what_cannot_be_computed_is_reported_where_it_stands(override, fault):
    with pytest.raises(ConfigError) as caught:
        load_config([*RECIPE, override])
    assert fault in caught.value.faults
