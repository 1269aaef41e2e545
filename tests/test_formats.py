"""Files that an earlier version wrote are read, or refused with a message that says why."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file

from srepa_ds.checkpoint.folder import fault_of
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.cli import run
from srepa_ds.config.experiment import Config, load_config
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.token_store import TokenStore
from srepa_ds.schema import validated
from srepa_ds.training.resume import unsafe_changes
from srepa_ds.trees import load_tree
from srepa_ds.weights.exported import read_model

FORMAT_1 = GOLDEN / "format-1"
EXPECTED = load_file(FORMAT_1 / "expected.safetensors")
STORE = "shards/teachers/vit_tiny_patch16_224-int8-6f4ccb62"
CHECKPOINT = "run/checkpoints/step-0000004"
WEIGHT = "sit.blocks.1.attn.qkv.weight"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A copy of the files, in the working folder: what a user has who installs a new version."""
    shutil.copytree(FORMAT_1, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def read_back(place: Path) -> dict[str, torch.Tensor]:
    """Everything that `expected.safetensors` holds, as this version reads it."""
    store = TokenStore(place / STORE)
    batch = ShardDataset(place / "shards", [store]).read(torch.arange(12))
    reader = CheckpointReader(place / CHECKPOINT)
    inputs = {name: EXPECTED[name] for name in ("x_t", "t", "labels_asked")}
    with torch.no_grad():
        velocity = read_model(place / "export").model(*inputs.values()).velocity
    return inputs | {
        "images": batch.images,
        "labels": batch.labels,
        "tokens": batch.teacher_tokens[0].patches_float32(),
        **{kind: reader.tensor(kind, WEIGHT) for kind in sorted(reader.kinds())},
        "velocity": velocity,
    }


def test_everything_is_read_as_it_was(place):
    found = read_back(place)
    assert found.keys() == EXPECTED.keys()
    for name in found.keys() - {"velocity"}:
        assert torch.equal(found[name], EXPECTED[name]), name
    torch.testing.assert_close(found["velocity"], EXPECTED["velocity"], rtol=1e-4, atol=1e-5)


def test_the_checkpoint_is_whole_and_exports_the_same_model(place):
    assert fault_of(place / CHECKPOINT) is None
    assert run(["export", "experiment.yaml", "export.folder=again"]) == 0
    again, before = (load_file(place / name / "model.safetensors") for name in ("again", "export"))
    assert again.keys() == before.keys()
    # The fixed position embedding is computed, not stored.
    for name in before.keys() - {"pos_embed"}:
        assert torch.equal(again[name], before[name]), name
    torch.testing.assert_close(again["pos_embed"], before["pos_embed"])
    engines = [
        json.loads((place / name / "config.json").read_text())["config"]["engine"]
        for name in ("again", "export")
    ]
    assert [engines[0]["activation_checkpointing"]] == [engines[1]["remat"]]
    assert "remat" not in engines[0]


def test_a_stored_configuration_is_read_under_todays_names_without_a_warning(place, caplog):
    trained = json.loads((place / CHECKPOINT / "state.json").read_text())["config"]
    resolved = load_tree(place / "run" / "config.yaml")
    assert "remat" in trained["engine"].keys() & resolved["engine"].keys()
    today = load_config(place / "experiment.yaml")
    assert validated(Config, trained, source="test") == today
    assert validated(Config, resolved, source="test") == today
    assert not list(unsafe_changes(trained, today))
    assert not caplog.records


@pytest.mark.slow
def test_a_training_goes_on_from_it(place):
    command = [sys.executable, "-m", "srepa_ds", "train", "experiment.yaml", "train.steps=6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    record = (place / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in record] == [5, 6]
    assert fault_of(place / "run" / "checkpoints" / "step-0000006") is None


@pytest.mark.parametrize("storage", ["raw", "png", "webp"])
def test_data_sets_of_format_2_are_read_as_they_were(storage):
    expected = load_file(GOLDEN / "format-2" / "expected.safetensors")
    dataset = ShardDataset(GOLDEN / "format-2" / storage)
    dataset.verify()
    batch = dataset.read(torch.arange(7), mirrored=torch.arange(7) % 2 == 1)
    for name in ("images", "moments", "labels"):
        assert torch.equal(getattr(batch, name), expected[f"{storage}.{name}"])
    assert dataset.keys(torch.tensor([6])) == ["00000006"]


DOCUMENTS = {
    "shards": ("shards/index.json", ["train", "experiment.yaml"]),
    "tokens": (f"{STORE}/index.json", ["train", "experiment.yaml"]),
    "checkpoint": (f"{CHECKPOINT}/manifest.json", ["export", "experiment.yaml", "export.step=4"]),
    "export": ("export/config.json", ["sample", "experiment.yaml"]),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_version_of_the_future_is_refused_by_name(place, capfd, kind):
    name, command = DOCUMENTS[kind]
    document = json.loads((place / name).read_text())
    document["version"] = 99
    (place / name).write_text(json.dumps(document))
    assert run(command) == 2
    said = capfd.readouterr().err
    assert said.count("error:") == 1
    assert "99" in said
    assert "Traceback" not in said
