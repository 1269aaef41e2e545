"""The configuration that DeepSpeed gets."""

from typing import get_args

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from srepa_ds.config.experiment import load_config
from srepa_ds.engine import deepspeed_settings
from srepa_ds.errors import TopologyError
from srepa_ds.model.precision import PRECISIONS, Precision
from srepa_ds.zero.settings import PRECISION_SETTINGS, micro_batch_size


def test_the_batch_is_shared_in_whole_samples():
    assert micro_batch_size(256, 2, 8) == 16
    assert micro_batch_size(3, 1, 3) == 1
    with pytest.raises(TopologyError, match=r"10 cannot be split over 2 ranks .* of 4"):
        micro_batch_size(10, 2, 2)


def test_every_precision_has_its_rows():
    assert tuple(PRECISIONS) == tuple(PRECISION_SETTINGS) == get_args(Precision)
    for row in PRECISIONS.values():
        assert not row.is_autocast or row.weights == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_reads_what_the_yaml_says(small_world, stage, precision):
    overrides = [
        f"engine.deepspeed=ds_configs/zero{stage}.json",
        f"engine.precision={precision}",
        "train.accumulation_steps=2",
        "optimizer.gradient_clipping=0.5",
    ]
    config = load_config(small_world.config, overrides)
    found = DeepSpeedConfig(deepspeed_settings(config, 1))
    assert (found.train_batch_size, found.train_micro_batch_size_per_gpu) == (16, 8)
    assert (found.gradient_accumulation_steps, found.gradient_clipping) == (2, 0.5)
    assert found.zero_optimization_stage == stage
    row = PRECISIONS[precision]
    assert found.bfloat16_config.enabled == (row.weights == torch.bfloat16)
    assert found.torch_autocast_enabled == row.is_autocast
    assert not found.zero_config.memory_efficient_linear or stage < 3
    # Its timer would wait for the device in every micro step.
    assert not found.timers_config.enabled
