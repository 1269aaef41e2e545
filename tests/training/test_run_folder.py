"""A run's folder: one training at a time, and no other experiment in the same place."""

import json

import pytest

from srepa_ds.config.experiment import Config, config_from
from srepa_ds.errors import ConfigError, OutputError
from srepa_ds.schema import to_tree
from srepa_ds.training.run_folder import check_shared, checkpoint_to_resume, claimed, unsafe_changes

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


def test_a_second_training_is_kept_out(tmp_path):
    with claimed(tmp_path / "run", is_main=True):
        second = claimed(tmp_path / "run", is_main=True)
        with pytest.raises(OutputError, match="another process is training"), second:
            raise AssertionError("two trainings share a folder")
        with claimed(tmp_path / "run", is_main=False):
            pass
    with claimed(tmp_path / "run", is_main=True):
        pass


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    folder = tmp_path / "runs" / "run"
    with claimed(folder, is_main=True):
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())
    with claimed(folder, is_main=True):
        (folder / "kept").touch()
    assert (folder / "kept").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    with claimed(mine, is_main=True):
        pass
    assert mine.is_dir()


def test_looking_whether_the_folder_is_shared_leaves_nothing(tmp_path):
    check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="cannot write to the run's folder"):
        check_shared(tmp_path / "none")


def test_other_data_behind_the_same_path_is_refused(tmp_path, write_checkpoint):
    config = built(run={"folder": str(tmp_path)})
    state = {"config": to_tree(config), "identity": {"data": "a", "alignments.0.teacher": "b"}}
    source = write_checkpoint(config.checkpoints, step=3, state=state)
    same = {"data": "a", "alignments.0.teacher": "b"}
    assert checkpoint_to_resume(config, same, allow_change=False) == source
    other = {**same, "data": "c"}
    with pytest.raises(ConfigError, match=r"1 fault\n  data: other .* hash was a, is c$"):
        checkpoint_to_resume(config, other, allow_change=False)
    # A checkpoint from before something was compared.
    assert checkpoint_to_resume(config, {**same, "data.shards": "d"}, allow_change=False) == source
    assert checkpoint_to_resume(config, other, allow_change=True) == source


@pytest.fixture
def write_checkpoint():
    from srepa_ds.checkpoint.saving import save

    def write(root, *, step, state):
        json.dumps(state)
        return save(root, step=step, pieces=[], state=state, rank=0)

    return write
