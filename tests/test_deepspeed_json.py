"""DeepSpeed's own file: what it may say, and what is refused before anything is built."""

import json
from pathlib import Path

import pytest

from srepa_ds.deepspeed_json import OWNED_BY_YAML, load_deepspeed_json
from srepa_ds.errors import ConfigError
from srepa_ds.zero import faults_in

DEEPSPEED = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.name)
def test_every_shipped_deepspeed_json_is_accepted(path):
    assert load_deepspeed_json(path)["zero_optimization"]["stage"] in range(4)
    assert not list(faults_in(load_deepspeed_json(path)["zero_optimization"]))


@pytest.mark.parametrize("key", OWNED_BY_YAML)
def test_a_deepspeed_json_that_repeats_the_yaml_is_refused(tmp_path, key):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: 1}))
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_json(path)
    (fault,) = caught.value.faults
    assert fault.path == key
    assert f"belongs to the YAML ({OWNED_BY_YAML[key]})" in fault.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"zero_optimisation": {"stage": 3}}', "did you mean 'zero_optimization'"),
        ('{"zero_optimization": 2}', '"stage" of 0 to 3'),
        ('{"zero_optimization": {"stage": 4}}', '"stage" of 0 to 3'),
        ('{"zero_optimization": {"stage": "2"}}', '"stage" of 0 to 3'),
    ],
)
def test_a_deepspeed_json_that_is_none_is_refused(tmp_path, text, words):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_deepspeed_json(path)


def test_a_misspelt_setting_of_zero_is_named():
    (fault,) = faults_in({"stage": 2, "reduce_bucket_siz": 1})
    assert fault.path == "zero_optimization.reduce_bucket_siz"
