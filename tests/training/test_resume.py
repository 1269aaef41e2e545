"""A resumed run is the same experiment: which settings may change, and what else must be equal."""

from fnmatch import fnmatch

import pytest

from srepa_ds.checkpoint.saving import save
from srepa_ds.config.experiment import Config, config_from
from srepa_ds.errors import ConfigError
from srepa_ds.schema import may_change, to_tree
from srepa_ds.training.resume import checkpoint_to_resume, unsafe_changes
from srepa_ds.trees import leaves

TEACHER = {"name": "dinov2-vit-b", "weights": "dinov2.safetensors"}
ALIGNMENT = {"teacher": TEACHER, "depth": 4, "structural": {"kind": "mse", "weight": 2.0}}
MOVED = {**ALIGNMENT, "teacher": {**TEACHER, "weights": "elsewhere.safetensors"}}


def built(**changes) -> Config:
    tree = {
        "run": {"folder": "runs/test"},
        "data": {"folder": "data/test"},
        "model": {"variant": "SiT-B/2", "input_size": 32, "in_channels": 4, "num_classes": 1000},
        "alignments": [ALIGNMENT],
        "train": {"steps": 10, "batch_size": 8},
    }
    return config_from({**tree, **changes}, source="test")


def lines_of(config: Config) -> list[str]:
    faults = unsafe_changes(to_tree(built()), config)
    return [f"{fault.path}: {fault.message}" for fault in faults]


MAY_CHANGE = (
    *("run.folder", "engine.*", "checkpoint.*", "export.*", "sample.*", "evaluate.*", "monitor.*"),
    *("structure.*", "sweep"),
    *("data.folder", "data.num_workers", "data.prefetch_batches"),
    *("data.read_threads", "data.read_attempts"),
    *("train.steps", "train.log_every_steps", "train.accumulation_steps"),
    *("train.max_skipped_steps", "train.max_rollbacks", "train.init_from.*"),
    *("model.attention", "optimizer.cpu_adam"),
    *("codec.weights", "codec.precision", "codec.tiled", "codec.batch_size"),
    *("alignments.*.teacher.weights", "alignments.*.teacher.compile"),
    *("alignments.*.structural.algorithm", "alignments.*.structural.tile"),
)
"""All settings that may change between a run and its resumption."""


def test_exactly_these_settings_may_change():
    plain = {**ALIGNMENT, "structural": None, "pointwise": {"weight": 1.0}}
    config = built(
        alignments=[ALIGNMENT, plain],
        train={"steps": 10, "batch_size": 8, "init_from": {"path": "weights.safetensors"}},
        evaluate={"reference": "data/test", "extractor": TEACHER},
    )
    paths = [path for path, _ in leaves(to_tree(config))]
    expected = [path for path in paths if any(fnmatch(path, rule) for rule in MAY_CHANGE)]
    assert all(any(fnmatch(path, rule) for path in expected) for rule in MAY_CHANGE)
    assert [path for path in paths if may_change(Config, path)] == expected


def test_sections_that_are_off_and_unknown_settings_follow_the_section_around_them():
    assert may_change(Config, "evaluate")
    assert may_change(Config, "train.init_from")
    assert may_change(Config, "engine.setting_of_another_version")
    assert not may_change(Config, "alignments.0.structural")
    assert not may_change(Config, "alignments")
    assert not may_change(Config, "train.setting_of_another_version")
    assert not may_change(Config, "section_of_another_version.steps")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run": {"folder": "elsewhere"}},
        {"train": {"steps": 99, "batch_size": 8, "log_every_steps": 1, "accumulation_steps": 2}},
        {"engine": {"deepspeed": "ds_configs/zero3.json", "precision": "fp32"}},
        {"data": {"folder": "moved", "num_workers": 3, "prefetch_batches": 2}},
        {"alignments": [MOVED]},
        {"checkpoint": {"every_steps": 1}, "sample": {"num_steps": 3}, "export": {"step": 5}},
    ],
)
def test_changes_that_keep_the_experiment_are_safe(changes):
    assert not list(unsafe_changes(to_tree(built()), built(**changes)))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"train": {"steps": 10, "batch_size": 16}}, ["train.batch_size: was 8, is 16"]),
        ({"ema": {"decay": 0.5}}, ["ema.decay: was 0.9999, is 0.5"]),
        ({"run": {"folder": "runs/test", "seed": 1}}, ["run.seed: was 0, is 1"]),
        ({"alignments": [{**ALIGNMENT, "depth": 5}]}, ["alignments.0.depth: was 4, is 5"]),
    ],
)
def test_changes_that_make_another_experiment_are_listed(changes, lines):
    assert lines_of(built(**changes)) == lines


def test_a_dropped_alignment_is_listed():
    lines = lines_of(built(alignments=[]))
    assert "alignments.0.teacher.name: was 'dinov2-vit-b', is None" in lines


def test_other_data_behind_the_same_path_is_refused(tmp_path):
    config = built(run={"folder": str(tmp_path)})
    state = {"config": to_tree(config), "identity": {"data": "a", "alignments.0.teacher": "b"}}
    source = save(config.run_folder.checkpoints, step=3, pieces=[], state=state, rank=0)
    same = {"data": "a", "alignments.0.teacher": "b"}
    assert checkpoint_to_resume(config, same, allow_change=False) == source
    other = {**same, "data": "c"}
    with pytest.raises(ConfigError, match=r"1 fault\n  data: the contents .* hash was a, is c$"):
        checkpoint_to_resume(config, other, allow_change=False)
    # A checkpoint from before something was compared.
    assert checkpoint_to_resume(config, {**same, "data.shards": "d"}, allow_change=False) == source
    assert checkpoint_to_resume(config, other, allow_change=True) == source
