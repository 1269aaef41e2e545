"""DeepSpeed's own file: the settings it may have, and those refused before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from places import ROOT

from srepa_ds.config.experiment import config_from
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.zero.json_file import (
    ALLOWED,
    MEANINGLESS,
    OFFLOAD_SETTINGS,
    OWNED_BY_YAML,
    ZERO_SETTINGS,
    load_deepspeed_json,
    offloads_optimizer,
    stage_of,
)

DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))


def written(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def faults(tmp_path: Path, document: Any) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_json(written(tmp_path, document))
    return list(caught.value.faults)


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.name)
def test_every_shipped_deepspeed_json_is_accepted_and_is_what_its_name_says(path):
    document = load_deepspeed_json(path)
    assert stage_of(document) == int(path.stem[4])
    assert offloads_optimizer(document) == path.stem.endswith("offload")
    DeepSpeedZeroConfig(**document["zero_optimization"])


def test_every_setting_we_take_is_one_of_deepspeeds():
    fields = DeepSpeedZeroConfig.model_fields
    assert set(ZERO_SETTINGS) <= {field.alias or name for name, field in fields.items()}
    for name in ("offload_optimizer", "offload_param"):
        for setting in OFFLOAD_SETTINGS:
            value = "cpu" if setting == "device" else True
            config = DeepSpeedZeroConfig(stage=3, **{name: {setting: value}})
            assert getattr(getattr(config, name), setting) == value


@pytest.mark.parametrize("name", ZERO_SETTINGS)
def test_what_we_take_deepspeed_takes(tmp_path, name):
    kind, stages = ZERO_SETTINGS[name]
    values = [False, True, 0, 1, 2e8, 2.5, -1, "cpu", {"device": "cpu"}]
    held = [value for value in values if kind.holds(value)]
    assert held
    for value in held:
        document = {"zero_optimization": {"stage": max(stages), name: value}}
        assert load_deepspeed_json(written(tmp_path, document)) == document
        DeepSpeedZeroConfig(**document["zero_optimization"])


# A document with one setting, and a test that DeepSpeed reads it.
READ = [
    ({"communication_data_type": "bf16"}, lambda c: c.communication_data_type is torch.bfloat16),
    ({"prescale_gradients": True}, lambda c: c.prescale_gradients),
    ({"gradient_predivide_factor": 2.5}, lambda c: c.gradient_predivide_factor == 2.5),
    ({"wall_clock_breakdown": True}, lambda c: c.wall_clock_breakdown),
    ({"zero_optimization": {"stage": 1}}, lambda c: c.zero_optimization_stage == 1),
    ({"comms_logger": {"enabled": True}}, lambda c: c.comms_config.comms_logger_enabled),
    # It turns on a message after every later step.
    ({"flops_profiler": {"enabled": True}}, lambda c: c.wall_clock_breakdown),
    ({"memory_breakdown": True}, lambda c: c.memory_breakdown),
    ({"dump_state": True}, lambda c: c.dump_state),
    ({"timers": {"throughput": {"enabled": False}}}, lambda c: not c.timers_config.enabled),
]


@pytest.mark.parametrize(("document", "is_read"), READ, ids=[next(iter(row[0])) for row in READ])
def test_every_setting_we_take_or_refuse_is_one_of_deepspeeds(tmp_path, document, is_read):
    assert not is_read(DeepSpeedConfig({"train_batch_size": 1}))
    assert is_read(DeepSpeedConfig({"train_batch_size": 1} | document))
    (name,) = document
    if name in ALLOWED:
        assert load_deepspeed_json(written(tmp_path, document)) == document
    else:
        (fault,) = faults(tmp_path, document)
        assert fault == Fault(name, f"means nothing here: {MEANINGLESS[name]}; remove it")


def test_no_setting_is_left_out_of_that():
    names = [name for document, _ in READ for name in document]
    assert sorted(names) == sorted([*ALLOWED, *MEANINGLESS])


@pytest.mark.parametrize("key", OWNED_BY_YAML)
def test_a_deepspeed_json_that_repeats_the_yaml_is_refused(tmp_path, key):
    (fault,) = faults(tmp_path, {"zero_optimization": {"stage": 2}, key: 1})
    assert fault.path == key
    assert f"belongs to the YAML ({OWNED_BY_YAML[key]})" in fault.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"prescale_gradients": true, "prescale_gradients": true}', "gradients' is given twice"),
        ('{"zero_optimisation": {"stage": 3}}', "did you mean 'zero_optimization'"),
        ('{"zero_optimization": 2}', r"must be an object \(given: 2\)"),
        ('{"zero_optimization": {"stage": 4}}', "must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": true}}', "must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "2"}}', r'must be 0, 1, 2 or 3 \(given: "2"\)'),
        ('{"communication_data_type": "bf32"}', '"fp32", "bf16" or "fp16"'),
        ('{"gradient_predivide_factor": 0}', "a number above 0"),
        ('{"wall_clock_breakdown": 1}', "must be true or false"),
    ],
)
def test_a_deepspeed_json_that_is_none_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        load_deepspeed_json(written(tmp_path, text))


@pytest.mark.parametrize(
    ("section", "path", "words"),
    [
        ({"stage": 2, "reduce_bucket_siz": 1}, "reduce_bucket_siz", "mean 'reduce_bucket_size'"),
        ({"stage": 2, "reduce_bucket_size": 0}, "reduce_bucket_size", "at least 1 (given: 0)"),
        ({"stage": 2, "reduce_bucket_size": "2e8"}, "reduce_bucket_size", "whole number"),
        ({"stage": 1, "overlap_comm": "no"}, "overlap_comm", 'true or false (given: "no")'),
        ({"stage": 3, "memory_efficient_linear": True}, "memory_efficient_linear", "wrong grad"),
        ({"stage": 2, "sub_group_size": 1}, "sub_group_size", "means nothing to stage 2"),
        ({"stage": 1, "offload_optimizer": {}}, "offload_optimizer", "choose stage 2 or 3"),
        ({"stage": 2, "offload_param": {}}, "offload_param", "choose stage 3"),
        ({"offload_optimizer": {}}, "offload_optimizer", "means nothing to stage 0"),
        ({"stage": 3, "offload_param": "cpu"}, "offload_param", "must be an object"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.device", '"cpu" or'),
        ({"stage": 3, "offload_param": {"pin": True}}, "offload_param.pin", "pin_memory"),
        ({"stage": 2, "cpu_offload": True}, "cpu_offload", "not supported here"),
    ],
)  # fmt: skip
def test_a_fault_inside_is_named(tmp_path, section, path, words):
    (fault,) = faults(tmp_path, {"zero_optimization": section})
    assert fault.path == f"zero_optimization.{path}"
    assert words in fault.message


def test_all_faults_are_named_at_once(tmp_path):
    document = {
        "train_batch_size": 8,
        "prescale_gradient": True,
        "dump_state": True,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": -1,
            "stage3_max_live_parameters": 1,
            "offload_optimizer": {"device": "gpu", "pinned": True},
        },
    }
    # Null in place of a number.
    document["zero_optimization"]["allgather_bucket_size"] = None
    assert {fault.path for fault in faults(tmp_path, document)} == {
        "train_batch_size",
        "prescale_gradient",
        "dump_state",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_optimizer.pinned",
    }


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [], None])
def test_no_value_is_too_strange(tmp_path, value):
    document = {"zero_optimization": {"stage": 2, "reduce_bucket_size": value}}
    (fault,) = faults(tmp_path, document)
    assert fault.path == "zero_optimization.reduce_bucket_size"
    assert set(ALLOWED).isdisjoint(OWNED_BY_YAML)


def test_what_the_rest_of_the_engine_forbids_is_named(tmp_path):
    document = {"communication_data_type": "bf16", "zero_optimization": {"stage": 3}}
    path = written(tmp_path, document)
    model = {"variant": "SiT-S/2", "input_size": 32, "in_channels": 4, "num_classes": 10}
    experiment = {"run": {"folder": "run"}, "data": {"folder": "data"}, "model": model}
    experiment["train"] = {"steps": 1}

    def load(**engine) -> None:
        config_from({**experiment, "engine": {"deepspeed": str(path), **engine}}, source="test")

    load()
    with pytest.raises(ConfigError) as caught:
        load(precision="bf16_autocast", compile=True)
    compiled, communication = caught.value.faults
    assert compiled.path == "engine.compile"
    assert "stage 3" in compiled.message
    assert "communication_data_type has no effect" in communication.message
